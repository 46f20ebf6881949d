"""What is measured: a cell is one shape under one workload."""

from dataclasses import dataclass
from typing import Literal

from bench.speed.shapes import SHAPES, Shape
from bench.speed.workloads import Lengths, Workload, draw, gsm8k_lengths, same_lengths

Target = Literal["cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class Cell:
    """`everyone`: all contestants are measured, else the service alone."""

    name: str
    shape_name: str
    lengths: Lengths
    rounds: int
    everyone: bool = False
    sequential: bool = False

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @property
    def response_tokens(self) -> int:
        return sum(tokens for _, responses in self.lengths for tokens in responses)

    @property
    def sequences(self) -> int:
        """Of the largest request."""
        counts = [len(responses) for _, responses in self.lengths]
        return max(counts) if self.sequential else sum(counts)

    def workload(self, round_: int) -> Workload:
        return draw(self.name, self.lengths, self.shape.vocabulary, round_, sequential=self.sequential)


def cpu_cells() -> tuple[Cell, ...]:
    """In the order of measuring: by shape, and what memory is measured in first, before anything else fills it."""
    a, long, gsm8k = same_lengths(1, 8, 128, 128), same_lengths(1, 8, 512, 1024), gsm8k_lengths()
    return (
        Cell("error_40m", "40m", a * 4, 1),
        Cell("b_40m", "40m", long, 2),
        Cell("a_40m", "40m", a * 4, 5, everyone=True),
        Cell("c_40m", "40m", gsm8k, 5, everyone=True),
        Cell("d_40m", "40m", same_lengths(16, 1, 128, 128), 5, everyone=True, sequential=True),
        Cell("b_05b", "05b", long, 2),
        Cell("a_05b", "05b", a, 3, everyone=True),
        Cell("c_05b", "05b", gsm8k, 3, everyone=True),
        Cell("d_05b", "05b", same_lengths(4, 1, 128, 128), 3, everyone=True, sequential=True),
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
        Cell("a_15b", "15b", a, 5, everyone=True),
        Cell("c_15b", "15b", gsm8k, 5, everyone=True),
        Cell("d_15b", "15b", same_lengths(16, 1, 128, 128), 5, everyone=True, sequential=True),
        Cell("b_7b", "7b", long, 5),
        Cell("a_7b", "7b", a, 5),
    )


def cells_of(target: Target) -> tuple[Cell, ...]:
    return cpu_cells() if target == "cpu" else gpu_cells()
