"""What is scored: random ids of given lengths, the same for every contestant.

Imports numpy alone: vLLM's worker reads it.

Each round draws ids of its own, so that nothing that remembers an earlier request can gain by it.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LENGTHS_FILE = Path(__file__).with_name("gsm8k_lengths.json")
Lengths = tuple[tuple[int, tuple[int, ...]], ...]  # of each prompt, and of its responses


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and the responses to it."""

    prompt_ids: list[int]
    response_ids: list[list[int]]

    @property
    def sequences(self) -> list[list[int]]:
        """Each response behind the prompt."""
        return [self.prompt_ids + ids for ids in self.response_ids]


@dataclass(frozen=True, slots=True)
class Workload:
    """Items in one request, or, where `sequential`, in one request each, one after the other."""

    items: tuple[Item, ...]
    sequential: bool = False

    @property
    def requests(self) -> list[tuple[Item, ...]]:
        return [(item,) for item in self.items] if self.sequential else [self.items]


def same_lengths(prompts: int, responses: int, prompt_tokens: int, response_tokens: int) -> Lengths:
    return ((prompt_tokens, (response_tokens,) * responses),) * prompts


def gsm8k_lengths(file: Path = LENGTHS_FILE) -> Lengths:
    """Pairs of a prompt and its only response, as the file holds them."""
    return tuple((prompt, (response,)) for prompt, response in json.loads(file.read_text())["pairs"])


def draw(name: str, lengths: Lengths, vocabulary: int, round_: int, *, sequential: bool = False) -> Workload:
    """Ids of the whole vocabulary; the same for the same name, lengths, vocabulary and round."""
    random = np.random.default_rng([zlib.crc32(name.encode()), round_])

    def ids(tokens: int) -> list[int]:
        drawn: list[int] = random.integers(0, vocabulary, tokens).tolist()
        return drawn

    items = tuple(Item(ids(prompt), [ids(tokens) for tokens in responses]) for prompt, responses in lengths)
    return Workload(items, sequential)


def write(workload: Workload, file: Path) -> Path:
    items = [{"prompt_ids": item.prompt_ids, "response_ids": item.response_ids} for item in workload.items]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"sequential": workload.sequential, "items": items}))
    return file


def read(file: Path) -> Workload:
    content = json.loads(file.read_text())
    return Workload(tuple(Item(**item) for item in content["items"]), content["sequential"])


def response_lengths(items: tuple[Item, ...]) -> Iterator[int]:
    """Of all responses, in the order of `sequences`."""
    yield from (len(ids) for item in items for ids in item.response_ids)
