"""The column `tokens`: parts of the text, whatever the tokenizer."""

import pytest
from dense_reward.bulk.local_scorer import token_texts
from tiny_tokenizers import FAMILIES, made

TEXT = "Hello world the cat,  x 数学😀é"


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_join_to_the_text(family: str) -> None:
    tokenizer = made(family)
    ids = [int(token) for token in tokenizer.encode(TEXT, special=False).ids]
    text, spans = tokenizer.text_and_spans(ids)
    tokens = token_texts(tokenizer.pieces(ids), text, spans)
    assert len(tokens) == len(ids)
    assert "".join(tokens) == text
    assert " world" in text


def test_the_token_that_ends_a_turn_has_its_name() -> None:
    assert token_texts(["b", "\ufffd", "\ufffd", "<eos>"], "bé", [(0, 1), (1, 1), (1, 2), (2, 2)]) == [
        "b",
        "",
        "é",
        "<eos>",
    ]
