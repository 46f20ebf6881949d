"""Long texts: tokenised like short ones, and refused by their windows before all of them is tokenised."""

import pytest
from dense_reward.engines import long_texts
from dense_reward.engines.long_texts import LONG_CHARACTERS, encoding_of
from dense_reward.errors import RequestError
from tiny_tokenizers import chatml
from tokenizers import Encoding, Tokenizer

TEXT = "What is the capital of Norway? <|im_end|> 12 rivers, \n\u00e9\u4e2d "


@pytest.fixture
def backend() -> Tokenizer:
    backend: Tokenizer = chatml().transformers_tokenizer.backend_tokenizer
    return backend


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that are tokenised without the GIL."""
    lengths: list[int] = []
    real = long_texts._without_gil

    def recorded(backend: Tokenizer, text: str) -> Encoding:
        lengths.append(len(text))
        return real(backend, text)

    monkeypatch.setattr(long_texts, "_without_gil", recorded)
    return lengths


def test_a_long_text_has_the_tokens_that_the_library_gives_it(backend: Tokenizer, tokenised: list[int]) -> None:
    text = TEXT * (LONG_CHARACTERS // len(TEXT) + 1)
    plain = backend.encode(text, add_special_tokens=False)
    for at_most in (None, len(plain), 10 * len(plain)):
        found = encoding_of(backend, text, at_most)
        assert (found.ids, found.offsets) == (plain.ids, plain.offsets)
    assert tokenised == [len(text)] * 3


def test_a_short_text_is_left_to_who_counts_with_what_stands_before_it(backend: Tokenizer) -> None:
    assert len(encoding_of(backend, TEXT, at_most=1)) > 1


def test_a_text_with_a_few_tokens_too_many_is_counted(backend: Tokenizer) -> None:
    text = TEXT * (LONG_CHARACTERS // len(TEXT) + 1)
    tokens = len(backend.encode(text, add_special_tokens=False))
    with pytest.raises(RequestError, match=rf"{tokens} tokens; the limit is {tokens - 1} \(--max-length-tokens\)"):
        encoding_of(backend, text, tokens - 1)


@pytest.mark.parametrize("before", ["", " " * 50_000])
def test_of_a_text_with_far_too_many_tokens_only_windows_are_tokenised(
    backend: Tokenizer, tokenised: list[int], before: str
) -> None:
    with pytest.raises(RequestError, match=r"more than 2000 tokens; the limit is 1000 ") as refused:
        encoding_of(backend, before + "12 " * 1_000_000, at_most=1_000)
    assert refused.value.code == "too_long"
    assert set(tokenised) == {8_000}
    assert sum(tokenised) < 100_000
