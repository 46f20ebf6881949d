"""The progress of a job, one line on stderr: how far it is, tokens per second, and the time that is left.

    120/400 steps |██████      | 02:31 left, 4,210 tokens/s, loss 0.412

The time left follows from the recent pace, tokens per second from the whole time since this start of the job. Where
stderr is no terminal, each state is a line of its own without the bar, at most every ten seconds, so that a log stays
short and readable.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from time import perf_counter
from types import TracebackType
from typing import Self, TypeVar

from dense_reward.checkpoints.slow_step import slow_step
from dense_reward.records import Report
from tqdm import tqdm

from dense_reward_trainer.runs.processes import is_first_process, silent

Item = TypeVar("Item")
_FORMAT = "{n_fmt}/{total_fmt} {unit} |{bar:24}| {remaining} left{postfix}"
_LINE = "{n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}"
_TERMINAL_S, _FILE_S = 0.1, 10.0


def busy(words: str) -> AbstractContextManager[None]:
    """Says what a job is busy with, such as `loading runs/a`, if that takes more than two seconds; above a progress."""
    return slow_step(_write if is_first_process() else silent, words)


def _write(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


class _Lines:
    """A file in which tqdm's states, which overwrite each other on a terminal, are lines; each state once."""

    _last = ""

    def write(self, text: str) -> int:
        state = text.strip()
        if state in {"", self._last}:
            return 0
        self._last = state
        return sys.stderr.write(f"{state}\n")

    def flush(self) -> None:
        sys.stderr.flush()


class Progress:
    """Counts what is done of `total`. `unit`: a plural, such as steps. `done`: what an earlier start had finished."""

    def __init__(self, total: int, unit: str, done: int = 0, *, clock: Callable[[], float] = perf_counter) -> None:
        self._clock, self._tokens = clock, 0
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            file=sys.stderr if terminal else _Lines(),
            bar_format=_FORMAT if terminal else _LINE,
            dynamic_ncols=terminal,
            mininterval=_TERMINAL_S if terminal else _FILE_S,
        )
        self._started = clock()

    def advance(self, count: int = 1, *, tokens: int = 0, note: str = "") -> None:
        """`count` more are done, with `tokens` more tokens. `note`: figures to show, such as `loss 0.412`."""
        self._tokens += tokens
        self._bar.set_postfix_str(", ".join(part for part in (self._speed(), note) if part), refresh=False)
        self._bar.update(count)

    def each(self, items: Iterable[Item], tokens: Callable[[Item], int]) -> Iterator[Item]:
        """The items, each counted with its number of tokens; the line ends after the last one, or an error."""
        with self:
            for item in items:
                yield item
                self.advance(tokens=tokens(item))

    def _speed(self) -> str:
        seconds = self._clock() - self._started
        return f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens and seconds > 0 else ""

    def beside(self, report: Report) -> Report:
        """`report`, which writes its lines above the progress instead of into it."""

        def report_above(text: str) -> None:
            with tqdm.external_write_mode(file=sys.stderr):
                report(text)

        return report_above

    def close(self) -> None:
        """Shows the final state, and ends the line."""
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
