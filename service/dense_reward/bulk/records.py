"""The records of bulk scoring: rows of the input, windows of them, and what scoring a row gave. No library of files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dense_reward.schemas import Item

if TYPE_CHECKING:
    import pyarrow as pa

Cells = dict[str, Any]
"""The columns of one row by name."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where reading goes on: the number of the next row, and of JSONL the byte at which its line begins."""

    row: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of the input. `number` counts from 0. `fault`: why it could not be read; it has no cells then."""

    number: int
    cells: Cells
    end: Position
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Rows that are read, scored and written together. `end`: where the next window begins."""

    rows: Sequence[SourceRow]
    end: Position


@dataclass(frozen=True, slots=True)
class Faulty:
    """Why a row cannot be scored, with the cure."""

    message: str


Response = Mapping[str, Any]
"""The scores of one response by column: float32 arrays [S] of its S scored tokens, and numbers."""
Outcome = Sequence[Response] | Faulty
"""What scoring a row gave: its responses, or why there are none."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A window and the outcome of each of its rows. `tokens`: prompts (once) and responses, as the engine counts."""

    window: Window
    outcomes: Sequence[Outcome]
    tokens: int


class Source(Protocol):
    """An input. Reading is a pure function of the position, so a run can go on anywhere."""

    @property
    def total(self) -> int:
        """Rows; of JSONL all lines, also empty ones, which are no rows."""
        ...

    @property
    def identity(self) -> Mapping[str, object]:
        """What must be equal for a run to go on: the kind, the place and a hash of the content."""
        ...

    @property
    def arrow_schema(self) -> "pa.Schema | None":
        """The pyarrow.Schema of the columns; None if they have no types."""
        ...

    def positions(self, start: Position, every: int) -> Iterator[Position]:
        """Where each run of `every` row numbers begins."""
        ...

    def rows(self, start: Position) -> Iterator[SourceRow]:
        """The rows from a position on, one after another, in constant memory."""
        ...


class Scorer(Protocol):
    """Scores items: a pair in this process, or services behind URLs. Belongs to one event loop."""

    @property
    def identity(self) -> Mapping[str, object]:
        """What computes the scores: name, revision, tokenizer_sha256."""
        ...

    @property
    def parallel(self) -> int:
        """How many windows it must have at the same time so that it never waits."""
        ...

    @property
    def characters(self) -> int:
        """About how many characters of text a window should hold; an id counts as 4."""
        ...

    async def score(self, items: Sequence[Item]) -> tuple[list[Outcome], int]:
        """The outcome of each item, and the tokens that were scored or read.

        Raises BulkError if not the items are at fault.
        """
        ...

    async def close(self) -> None: ...
