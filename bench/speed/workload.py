"""Workloads: model shapes, token lengths, random ids, the cells that are measured, and the FLOPs that they need.

Imports only numpy: vLLM's worker imports this module in an environment without the project's other dependencies.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

Target = Literal["cpu", "gpu"]
Lengths = tuple[tuple[int, tuple[int, ...]], ...]
"""Tokens of each prompt, and of each of its responses."""
LENGTHS_FILE = Path(__file__).with_name("gsm8k_lengths.json")
MODELS = 2  # sft and reference


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a Qwen2 model."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocab_size: int
    tied: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of the matmuls of one layer: query and output, key and value, and the three of the MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.key_value_heads)
        return attention + 3 * self.hidden * self.intermediate


HALF_BILLION = Shape(896, 24, 14, 2, 4864, 151_936)
SHAPES: Mapping[str, Shape] = {
    "40m": Shape(512, 8, 8, 2, 1536, 32_000),
    "05b": HALF_BILLION,
    "05b_v32k": replace(HALF_BILLION, vocab_size=32_000),
    "05b_v128k": replace(HALF_BILLION, vocab_size=128_000),
    "05b_v256k": replace(HALF_BILLION, vocab_size=256_000),
    "15b": Shape(1536, 28, 12, 2, 8960, 151_936),
    "7b": Shape(3584, 28, 28, 4, 18_944, 152_064, tied=False),
}


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and its responses."""

    prompt_ids: list[int]
    response_ids: list[list[int]]

    @property
    def sequences(self) -> list[list[int]]:
        """The prompt followed by each response."""
        return [self.prompt_ids + ids for ids in self.response_ids]


@dataclass(frozen=True, slots=True)
class Workload:
    """Items to score: all in one request or, if `sequential`, one request after another with one item each."""

    items: tuple[Item, ...]
    sequential: bool = False

    @property
    def requests(self) -> list[tuple[Item, ...]]:
        return [(item,) for item in self.items] if self.sequential else [self.items]


def same_lengths(prompts: int, responses: int, prompt_tokens: int, response_tokens: int) -> Lengths:
    return ((prompt_tokens, (response_tokens,) * responses),) * prompts


def gsm8k_lengths(file: Path = LENGTHS_FILE) -> Lengths:
    """Reads pairs of a prompt and its only response."""
    return tuple((prompt, (response,)) for prompt, response in json.loads(file.read_text())["pairs"])


def draw(name: str, lengths: Lengths, vocab_size: int, round_: int, *, sequential: bool = False) -> Workload:
    """Draws ids from the whole vocabulary. The same arguments give the same ids.

    Each round has different ids, so that a contestant that caches earlier requests gains nothing.
    """
    random = np.random.default_rng([zlib.crc32(name.encode()), round_])

    def ids(tokens: int) -> list[int]:
        drawn: list[int] = random.integers(0, vocab_size, tokens).tolist()
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


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: a model shape with a workload. Unless `compared`, only the service is measured."""

    name: str
    shape_name: str
    lengths: Lengths
    rounds: int
    compared: bool = False
    sequential: bool = False

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @property
    def response_tokens(self) -> int:
        return sum(tokens for _, responses in self.lengths for tokens in responses)

    @property
    def sequences(self) -> int:
        """Number of sequences in the largest request."""
        counts = [len(responses) for _, responses in self.lengths]
        return max(counts) if self.sequential else sum(counts)

    def workload(self, round_: int) -> Workload:
        return draw(self.name, self.lengths, self.shape.vocab_size, round_, sequential=self.sequential)


def cpu_cells() -> tuple[Cell, ...]:
    """Cells in the order of measuring: grouped by shape.

    Within a shape the memory cell comes first, before other cells have grown the service's memory.
    """
    a, long, gsm8k = same_lengths(1, 8, 128, 128), same_lengths(1, 8, 512, 1024), gsm8k_lengths()
    return (
        Cell("error_40m", "40m", a * 4, 1),
        Cell("b_40m", "40m", long, 2),
        Cell("a_40m", "40m", a * 4, 5, compared=True),
        Cell("c_40m", "40m", gsm8k, 5, compared=True),
        Cell("d_40m", "40m", same_lengths(16, 1, 128, 128), 5, compared=True, sequential=True),
        Cell("conversations_40m", "40m", (), 1),
        Cell("b_05b", "05b", long, 2),
        Cell("a_05b", "05b", a, 3, compared=True),
        Cell("c_05b", "05b", gsm8k, 3, compared=True),
        Cell("d_05b", "05b", same_lengths(4, 1, 128, 128), 3, compared=True, sequential=True),
        Cell("e_length_1k", "05b", same_lengths(1, 8, 128, 1024), 2),
        Cell("e_length_8k", "05b", same_lengths(1, 1, 128, 8192), 2),
        Cell("e_group_1", "05b", same_lengths(1, 1, 128, 128), 2),
        Cell("e_group_64", "05b", same_lengths(1, 64, 128, 128), 2),
        Cell("e_vocabulary_32k", "05b_v32k", a, 2),
        Cell("e_vocabulary_128k", "05b_v128k", a, 2),
        Cell("e_vocabulary_256k", "05b_v256k", a, 2),
    )


def gpu_cells() -> tuple[Cell, ...]:
    a, long, gsm8k = same_lengths(8, 8, 128, 128), same_lengths(4, 8, 512, 1024), gsm8k_lengths()
    return (
        Cell("b_15b", "15b", long, 5),
        Cell("a_15b", "15b", a, 5, compared=True),
        Cell("c_15b", "15b", gsm8k, 5, compared=True),
        Cell("d_15b", "15b", same_lengths(16, 1, 128, 128), 5, compared=True, sequential=True),
        Cell("b_7b", "7b", long, 5),
        Cell("a_7b", "7b", a, 5),
    )


def cells_of(target: Target) -> tuple[Cell, ...]:
    return cpu_cells() if target == "cpu" else gpu_cells()


def flops_of(shape: Shape, lengths: Lengths) -> int:
    """Minimum number of floating-point operations with which both models can score these lengths.

    Each prompt is computed once for its responses. A multiplication and an addition are two operations. Norms,
    rotations, activations and softmax are not counted.
    """
    return MODELS * sum(_prompt_flops(shape, prompt, responses) for prompt, responses in lengths)


def _prompt_flops(shape: Shape, prompt: int, responses: tuple[int, ...]) -> int:
    """Operations of one model for one prompt.

    The last token of a response predicts nothing: neither its position nor its row of logits is counted. Each other
    position after the prompt predicts one token; the prompt's last one predicts the first token of every response.
    """
    after_prompt = sum(tokens - 1 for tokens in responses)
    linear = 2 * shape.layers * shape.layer_weights * (prompt + after_prompt)
    head = 2 * shape.hidden * shape.vocab_size * (1 + after_prompt)
    attention = 4 * shape.layers * shape.heads * shape.head_dim * causal_pairs(prompt, responses)
    return linear + head + attention


def causal_pairs(prompt: int, responses: tuple[int, ...]) -> int:
    """Pairs of query and key: each position with itself and with all earlier positions of its sequence."""
    return triangle(prompt) + sum((tokens - 1) * prompt + triangle(tokens - 1) for tokens in responses)


def triangle(n: int) -> int:
    return n * (n + 1) // 2
