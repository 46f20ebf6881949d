"""Ids as people have them: what is taken for which request, and what is refused with the cure."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from dense_reward.client.ids import item_of, one_row, rows
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BatchEncoding


def lists(found: object) -> list[list[int]]:
    assert isinstance(found, Iterable)
    return [np.asarray(row).tolist() for row in found]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 2], [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([[], [3]], [[], [3]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([torch.tensor([1, 2]), torch.tensor([3])], [[1, 2], [3]]),
        (
            BatchEncoding({"input_ids": [[0, 1, 2], [3, 4, 0]], "attention_mask": [[0, 1, 1], [1, 1, 0]]}),
            [[1, 2], [3, 4]],
        ),
        (
            BatchEncoding({"input_ids": torch.tensor([[9, 9, 5]]), "attention_mask": torch.tensor([[0, 0, 1]])}),
            [[5]],
        ),
        ({"input_ids": [7, 8]}, [[7, 8]]),
    ],
    ids=["flat", "array", "tensor", "nested", "empty_first", "square", "tensors", "padded", "padded_left", "unpadded"],
)
def test_responses_are_taken_where_they_have_one_meaning(given: object, expected: list[list[int]]) -> None:
    assert lists(rows(given)) == expected


def padding_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.enable_padding(length=4, pad_id=0, pad_token="a")
    return tokenizer


def test_an_encoding_of_tokenizers_is_one_sequence() -> None:
    encoding: Encoding = padding_tokenizer().encode("b b")
    assert encoding.ids == [1, 1, 0, 0]
    assert lists(rows(encoding)) == [[1, 1]]


def test_outputs_of_a_tokenizer_in_a_list_lose_their_padding_too() -> None:
    batch = padding_tokenizer().encode_batch(["b b", "a b b"])
    assert lists(rows(batch)) == [[1, 1], [0, 1, 1]]
    assert lists(rows([[7], batch[0]])) == [[7], [1, 1]]
    assert np.asarray(one_row(batch[:1], "prompt_ids")).tolist() == [1, 1]
    outputs = [BatchEncoding({"input_ids": [0, 5], "attention_mask": [0, 1]}), {"input_ids": [6, 7]}]
    assert lists(rows(outputs)) == [[5], [6, 7]]


@pytest.mark.parametrize("given", [[1, 2], [[1, 2]], np.array([1, 2]), torch.tensor([[1, 2]])], ids=str)
def test_a_prompt_is_one_sequence(given: object) -> None:
    found: NDArray[np.int64] = np.asarray(one_row(given, "prompt_ids"))
    assert found.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("item", "cure"),
    [
        ({"prompt_ids": [[1], [2]], "response_ids": [3]}, "make an item of each sequence"),
        ({"prompt_ids": {"input_ids": [[1], [2]], "attention_mask": [[1], [1]]}}, "make an item of each"),
        ({"prompt_ids": [1], "response_ids": {"input_ids": [[1, 0], [2, 2]]}}, "attention_mask"),
        ({"prompt_ids": padding_tokenizer().encode_batch(["a", "b"])}, "make an item of each sequence"),
        ({"prompt_ids": [1], "response_ids": [{"input_ids": [[1], [2]]}]}, "attention_mask"),
        ({"prompt_ids": [1], "response_ids": {"ids": [1]}}, "the output of a tokenizer"),
        ({"prompt_ids": "text", "response_ids": [1]}, "for text use score"),
        ({"prompt_ids": [{"role": "user"}], "response_ids": [1]}, "use score_messages"),
        ({"input_ids": [1, 2]}, "pass it inside an item"),
        ([1, 2], "an item must be a mapping"),
    ],
    ids=[
        "two_prompts",
        "batch",
        "no_mask",
        "encodings",
        "no_mask_inside",
        "no_ids",
        "text",
        "chat",
        "encoding",
        "list",
    ],
)
def test_what_has_no_single_meaning_is_refused_with_the_cure(item: object, cure: str) -> None:
    with pytest.raises((TypeError, ValueError), match=cure):
        item_of(item)


@pytest.mark.parametrize(
    "mask", [[False, True], np.array([False, True]), torch.tensor([False, True])], ids=lambda mask: type(mask).__name__
)
def test_a_mask_can_be_of_bools(mask: object) -> None:
    assert np.asarray(item_of({"token_ids": [1, 2], "score_mask": mask})["score_mask"]).tolist() == [0, 1]
    kept = BatchEncoding({"input_ids": [[1, 2]], "attention_mask": [np.asarray(mask)]})
    assert lists(rows(kept)) == [[2]]


def test_packed_sequences_and_numbers_that_are_no_ids_are_refused_and_nothing_is_dropped() -> None:
    packed = BatchEncoding({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 2, 2]]})
    with pytest.raises(ValueError, match=r"other numbers than 0 and 1.*pass the ids of each sequence as a list"):
        rows(packed)
    with pytest.raises(TypeError, match=r"BFloat16.*call \.long\(\)"):
        rows(torch.ones(2, dtype=torch.bfloat16))
