"""Scores an input on Ray Data: each actor reads its own windows and scores them with a pair of its own.

Only positions travel to the actors, and scored windows travel back, in order; the process that was started writes
them. So columns, resuming and errors are the same as without Ray. Every node must be able to read the input.
"""

import asyncio
import logging
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from dense_reward.bulk.columns import Columns
from dense_reward.bulk.job import Writing
from dense_reward.bulk.local_scorer import LocalScorer, ScoreTerms
from dense_reward.bulk.records import Position, Scored, Source, Window
from dense_reward.bulk.sources import library
from dense_reward.bulk.windows import score_window
from dense_reward.errors import BulkError
from dense_reward.settings import Settings

TASK_ROWS = 256
"""Rows of a window."""
TASKS_AT_MOST = 10_000
"""Ray keeps some memory for each task; larger inputs have more windows in a task."""


@dataclass(frozen=True, slots=True)
class Workers:
    """How many actors, and what each needs. `count` None: one for each GPU of the cluster, or one without GPUs."""

    count: int | None
    gpus_each: float | None
    address: str | None


def score_with_ray(writer: Writing, settings: Settings, terms: ScoreTerms, workers: Workers) -> None:
    """Score the rest of the input. Raises BulkError, SettingsError."""
    ray = library("ray", "--ray")
    data = library("ray.data", "--ray (its part ray[data])")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.init(address=workers.address, ignore_reinit_error=True, log_to_driver=False, logging_level="warning")
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = workers.count or max(1, gpus)
    gpus_each = workers.gpus_each if workers.gpus_each is not None else float(gpus >= count)
    positions = writer.job.source.positions(writer.state.position, TASK_ROWS)
    starts = [asdict(position) for position in positions]
    if not starts:
        return
    data.DataContext.get_current().execution_options.preserve_order = True
    data.DataContext.get_current().enable_progress_bars = False
    rows = data.from_items(starts, override_num_blocks=min(len(starts), TASKS_AT_MOST))
    scored = rows.map_batches(
        Worker,
        fn_constructor_args=(writer.job.source, writer.job.columns, settings, terms),
        batch_size=None,
        compute=data.ActorPoolStrategy(size=count),
        num_gpus=gpus_each or None,
        num_cpus=None if gpus_each else 1,
    )
    try:
        for row in scored.iter_rows():
            found, identity = pickle.loads(row["scored"])
            writer.check_model(identity)
            writer.put(found)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise BulkError(f"a worker of Ray failed: {str(cause).strip().splitlines()[-1]}") from None


class Worker:
    """One actor: a pair, and the windows that it is given."""

    def __init__(self, source: Source, columns: Columns, settings: Settings, terms: ScoreTerms) -> None:
        self._source, self._columns = source, columns
        self._loop = asyncio.new_event_loop()
        self._scorer = self._loop.run_until_complete(_started(settings, terms))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """The scored windows that begin at these positions."""
        starts = zip(batch["row"].tolist(), batch["offset"].tolist(), strict=True)
        found = self._loop.run_until_complete(self._scored([Position(row, offset) for row, offset in starts]))
        return {"scored": [pickle.dumps((scored, self._scorer.identity)) for scored in found]}

    async def _scored(self, starts: list[Position]) -> list[Scored]:
        waiting = asyncio.Semaphore(self._scorer.parallel)

        async def score(start: Position) -> Scored:
            async with waiting:
                return await score_window(self._window(start), self._columns, self._scorer)

        return list(await asyncio.gather(*map(score, starts)))

    def _window(self, start: Position) -> Window:
        rows = list(takewhile(lambda row: row.number < start.row + TASK_ROWS, self._source.rows(start)))
        return Window(rows, rows[-1].end if rows else start)


async def _started(settings: Settings, terms: ScoreTerms) -> LocalScorer:
    scorer = LocalScorer(settings, terms)
    await scorer.start()
    return scorer
