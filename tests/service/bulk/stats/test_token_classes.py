"""The class of a token by its text."""

import pytest
from dense_reward.bulk.stats.token_classes import CLASSES, token_classes


@pytest.mark.parametrize(
    ("tokens", "classes"),
    [
        ("The| cat|s|.", "word start, word start, continuation, punctuation"),
        ("a|b| |c", "word start, continuation, whitespace, word start"),
        ("x| =| 12|3|km", "word start, punctuation, number, number, word start"),
        ("<|im_end|>|</s>|[INST]|<eos>", "special, special, special, special"),
        ("\n\n|\t", "whitespace, whitespace"),
        ("\ufffd|\ufffd", "word start, continuation"),
        ("|数||.|", "word start, continuation, continuation, punctuation, word start"),
        ("über|größe", "word start, continuation"),
        ("<|<=", "punctuation, punctuation"),
    ],
    ids=["words", "letters", "numbers", "special", "spaces", "pieces", "parts", "umlauts", "signs"],
)
def test_tokens_have_their_classes(tokens: str, classes: str) -> None:
    separated = ["<|im_end|>", "</s>", "[INST]", "<eos>"] if "im_end" in tokens else tokens.split("|")
    assert ", ".join(CLASSES[index] for index in token_classes(separated)) == classes
