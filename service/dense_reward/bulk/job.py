"""Scores an input into an output: goes on where an earlier run ended, and loses and doubles no row."""

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from dense_reward.bulk.columns import Columns
from dense_reward.bulk.outputs import Output, open_output
from dense_reward.bulk.records import Faulty, Outcome, Scored, Scorer, Source, SourceRow
from dense_reward.bulk.run_state import RunState, differences, load_state, locked, state_file, writing
from dense_reward.bulk.windows import Shard, WindowSize, scored_in_order, windows
from dense_reward.errors import BulkError, SettingsError

ALL_ROWS = Shard()
SYNC_S, SYNC_TOKENS = 5.0, 500_000
"""What is written becomes safe after this time, or this many tokens. A killed process repeats at most that."""
WINDOW_ROWS = 1024


class Progress(Protocol):
    """Called with the rows and tokens that were done."""

    def __call__(self, rows: int, tokens: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What to score into which output. `options`: what else decides the content of the output."""

    source: Source
    out: Path
    columns: Columns
    options: Mapping[str, Any]
    shard: Shard = ALL_ROWS
    on_error: Literal["fail", "keep"] = "fail"

    @property
    def made_from(self) -> dict[str, Any]:
        return {"input": dict(self.source.identity), "options": dict(self.options)}

    @property
    def total(self) -> int:
        """Rows of the shard; of JSONL also its empty lines."""
        return self.shard.rows(self.source.total)


@dataclass(slots=True)
class Writing:
    """The output and its state. Every row passes through `put`, in order.

    Rows and counts are saved together or not at all: an interrupted run may end while a thread is inside `put`, and an
    interrupt that is raised inside `put` may leave rows without their counts.
    """

    job: Job
    output: Output
    state: RunState
    progress: Progress
    _synced_at: float = field(default_factory=time.monotonic)
    _tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _torn: bool = False
    _ended: bool = False

    def check_model(self, identity: Mapping[str, object]) -> None:
        """Raises SettingsError if other models wrote the rows that exist. The first call decides."""
        before = self.state.made_from.setdefault("model", dict(identity))
        changed = list(differences(before, dict(identity)))
        if changed:
            raise SettingsError(
                f"{self.job.out} holds rewards of another model ({'; '.join(changed)}): use that model, name another "
                "--out, or give --overwrite to start again"
            )

    def put(self, scored: Scored) -> None:
        """Write a window. Raises BulkError for a failed write, and for a row that cannot be scored unless it is kept.

        The rows before the one at fault are written first.
        """
        with self._whole():
            if not self._ended:
                self._put(scored)

    def sync(self) -> None:
        """Make what was written safe, then say so on the disk. Raises BulkError."""
        with self._whole():
            self._sync()

    def end(self) -> None:
        """Save what is whole, and write no more rows. Raises BulkError."""
        with self._lock:
            self._ended = True
            if not self._torn:
                self._sync()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A step, one at a time. An error leaves rows and counts equal; an interrupt may not."""
        with self._lock:
            self._torn = True
            try:
                yield
            except Exception:
                self._torn = False
                raise
            self._torn = False

    def _put(self, scored: Scored) -> None:
        pairs = list(zip(scored.window.rows, scored.outcomes, strict=True))
        faulty = [index for index, (_, outcome) in enumerate(pairs) if isinstance(outcome, Faulty)]
        stops = bool(faulty) and self.job.on_error == "fail"
        good = pairs[: faulty[0]] if stops else pairs
        rows = [cells for row, outcome in good for cells in self.job.columns.output_rows(row, outcome)]
        with writing(self.job.out):
            self.output.add(rows)
        if not stops:
            self.state.position = scored.window.end
        elif good:
            self.state.position = good[-1][0].end
        self.state.rows += len(good)
        self.state.output_rows += len(rows)
        self.state.errors += 0 if stops else len(faulty)
        # Not scored.tokens, which also counts rows behind the one at fault: they are scored again.
        written = [response for _, outcome in good if not isinstance(outcome, Faulty) for response in outcome]
        self.state.tokens += sum(int(response["length"]) for response in written)
        self._tokens += scored.tokens
        self.progress(len(good), scored.tokens)
        if stops:
            raise _row_error(*pairs[faulty[0]], after_others=self.state.rows > 0)
        if time.monotonic() - self._synced_at > SYNC_S or self._tokens > SYNC_TOKENS:
            self._sync()

    def _sync(self) -> None:
        with writing(self.job.out):
            self.state.written = self.output.sync()
            self.state.save(state_file(self.job.out))
        self._synced_at, self._tokens = time.monotonic(), 0

    def finish(self) -> None:
        """Complete the output. Raises BulkError."""
        self.sync()
        with writing(self.job.out):
            self.output.finish({**self.state.made_from, "rows": self.state.rows, "errors": self.state.errors})
            self.state.done = True
            self.state.save(state_file(self.job.out))
            self.output.tidy()


def _row_error(row: SourceRow, outcome: Outcome, *, after_others: bool) -> BulkError:
    assert isinstance(outcome, Faulty)
    cure = "The rows before it are written. Correct the data and give --overwrite, or continue with"
    if not after_others:
        cure = "No row is written yet. Correct the data or the options and run the command again, or give"
    return BulkError(
        f"row {row.number} (counted from 0) cannot be scored: {outcome.message}\n{cure} --on-error keep, which writes "
        "the error of such rows"
    )


@contextmanager
def opened(job: Job, progress: Progress) -> Iterator[Writing]:
    """The output of a job, held by this process. What was written is made safe in the end, whatever happens.

    Raises SettingsError if another process holds it, or it was made from something else.
    """
    with locked(job.out):
        state = load_state(job.out, job.made_from)
        output = open_output(job.out, job.source.arrow_schema, job.columns.arrays, job.columns.kept_name)
        writer = Writing(job, output, state, progress)
        if state.done:
            output.tidy()
            yield writer
            return
        with writing(job.out):
            state.save(state_file(job.out))  # before the output: one without a state is not ours
            output.begin(state.written)
        try:
            yield writer
        except BaseException:
            with suppress(BulkError):  # the first error is the one to report
                writer.end()
            raise
        writer.finish()


async def score(writer: Writing, scorer: Scorer) -> None:
    """Score the rest of the input. Raises BulkError, SettingsError."""
    job = writer.job
    writer.check_model(scorer.identity)
    size = WindowSize(WINDOW_ROWS, scorer.characters, scorer.parallel)
    cut = windows(job.source, writer.state.position, job.shard, size)
    async with aclosing(scored_in_order(cut, job.columns, scorer)) as found:
        async for scored in found:
            await asyncio.to_thread(writer.put, scored)
