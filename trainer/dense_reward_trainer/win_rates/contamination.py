"""Which test prompts occur in the training prompts, by three definitions of the field.

`exact`: the normalised text is equal. `ngram_13`: they share 13 words in a row (GPT-3, 2005.14165, appendix C).
`share_8`: the share of a prompt's words that are in a run of 8 which the training prompts have (Llama 3, 2407.21783,
section 5.1.4; its tokens are words here). A prompt is contaminated if it is `exact`, or has a shared run of 13.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GPT3_WORDS, LLAMA_WORDS = 13, 8
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Overlap:
    """What one test prompt shares with the training prompts."""

    exact: bool
    ngram_13: bool
    share_8: float

    @property
    def contaminated(self) -> bool:
        """By the definition of GPT-3; a prompt shorter than 13 words counts if the whole of it is equal."""
        return self.exact or self.ngram_13


def overlaps(training: Iterable[str], tests: Sequence[str]) -> list[Overlap]:
    """The overlap of each test prompt. Holds the n-grams of the tests, not those of the training prompts."""
    words = [_words(test) for test in tests]
    wanted = {n: {gram for test in words for gram in _grams(test, n)} for n in (GPT3_WORDS, LLAMA_WORDS)}
    whole: set[tuple[str, ...]] = set()
    shared: dict[int, set[tuple[str, ...]]] = {n: set() for n in wanted}
    candidates = {tuple(test) for test in words}
    for prompt in training:
        found = _words(prompt)
        whole |= {tuple(found)} & candidates
        for n, grams in wanted.items():
            shared[n].update(gram for gram in _grams(found, n) if gram in grams)
    return [
        Overlap(
            tuple(test) in whole,
            any(gram in shared[GPT3_WORDS] for gram in _grams(test, GPT3_WORDS)),
            _share(test, shared[LLAMA_WORDS]),
        )
        for test in words
    ]


def _share(words: list[str], shared: set[tuple[str, ...]]) -> float:
    covered = {
        place
        for start, gram in enumerate(_grams(words, LLAMA_WORDS))
        if gram in shared
        for place in range(start, start + LLAMA_WORDS)
    }
    return len(covered) / len(words) if words else 0.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
