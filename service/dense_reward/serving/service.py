"""What lives as long as the process: the queue, the pairs behind it, and the state that /ready tells."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from dense_reward.batching.batcher import Batcher
from dense_reward.batching.worker_threads import WorkerThreads
from dense_reward.errors import RETRY_UNAVAILABLE_S, CheckpointError, LoadingStoppedError, SettingsError, refuse
from dense_reward.schemas import ModelCard
from dense_reward.scoring.scorer import Scorer
from dense_reward.serving.loaders import LoadPair
from dense_reward.serving.pair_sources import PairSource, first_pairs
from dense_reward.serving.registry import Registry
from dense_reward.settings import Settings
from dense_reward.telemetry.metrics import Metrics, MetricsSnapshot
from dense_reward.telemetry.tracing import Tracing

log = logging.getLogger("dense_reward")
State = Literal["starting", "ready", "draining", "failed"]


@dataclass(slots=True)
class Service:
    """Pairs behind one queue. `start` returns at once; /ready is true only after the proof of all first pairs."""

    settings: Settings
    load: LoadPair
    on_failure: Callable[[], None]
    metrics: Metrics = field(default_factory=Metrics)
    state: State = "starting"
    progress: str = "waiting for the first step"
    tracing: Tracing | None = field(init=False)
    threads: WorkerThreads = field(default_factory=lambda: WorkerThreads(2, "encode"))
    batcher: Batcher = field(init=False)
    _pairs: Registry = field(init=False)
    _tasks: "set[asyncio.Task[None] | asyncio.Task[ModelCard]]" = field(default_factory=set)
    _stop_at_s: float = math.inf

    def __post_init__(self) -> None:
        self.batcher = Batcher(
            self.metrics,
            max_batch_tokens=self.settings.max_batch_tokens,
            max_queue_tokens=self.settings.max_queue_tokens,
        )
        self._pairs = Registry(self.settings, self.load, self.batcher, self.metrics, self.threads, self._report)
        endpoint = self.settings.otlp_endpoint
        self.tracing = None if endpoint is None else Tracing(endpoint)

    def start(self) -> None:
        self._tasks |= {asyncio.create_task(self._run()), asyncio.create_task(self._start())}

    def drain(self) -> None:
        """Let nobody in any more. Loading that is under way ends at its next step."""
        if self.state != "failed":
            self.state = "draining"
        self._stop_at_s = min(self._stop_at_s, time.monotonic() + self.settings.drain_s)

    async def stop(self) -> None:
        """Finish what was let in, then return; at the end of --drain-s in any case, what is not done left behind."""
        self.drain()
        self.batcher.close()
        await asyncio.wait(self._tasks, timeout=max(0.0, self._stop_at_s - time.monotonic()))
        if self.is_busy:
            log.warning("stopped before all was done")
        self.threads.shutdown()
        self._pairs.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    @property
    def is_busy(self) -> bool:
        """Whether something is being computed or loaded."""
        return not all(task.done() for task in self._tasks)

    @property
    def loading(self) -> str | None:
        """The name of the pair that is being loaded over HTTP."""
        return self._pairs.loading

    @property
    def unavailable_reason(self) -> str | None:
        """Why a pair answers nothing now, though it may again."""
        return self._pairs.unavailable_reason

    def check_ready(self) -> None:
        """Raises RequestError: starting or draining, with the seconds after which to ask again."""
        if self.state != "ready":
            code = "draining" if self.state == "draining" else "starting"
            raise refuse(code, f"the service is {self.state}", retry_after_s=RETRY_UNAVAILABLE_S)

    def scorer(self, name: str | None = None) -> Scorer:
        """The pair of that name; the first one where left out. For requests that were let in. Raises RequestError."""
        if self._pairs.is_empty:
            self.check_ready()
        self._pairs.check_well(name)
        return self._pairs.scorer(name)

    def cards(self) -> list[ModelCard]:
        """Of every pair, the first one first. Raises RequestError where /score would for any."""
        self.check_ready()
        return self._pairs.cards

    def snapshot(self) -> MetricsSnapshot:
        """What metrics tell of this moment."""
        return MetricsSnapshot(
            ready=self.state == "ready" and self.unavailable_reason is None,
            queue_tokens=self.batcher.admission.held_tokens,
            tokens_per_s=self.batcher.admission.rate_tokens_per_s,
            revisions={card.name: card.revision for card in self._pairs.cards},
            memory_bytes=self._pairs.memory_bytes(),
            results_bytes=self._pairs.results.kept_bytes,
        )

    async def add(self, source: PairSource) -> ModelCard:
        """Serve another pair, or one in the place of the pair of its name: see Registry. Raises RequestError.

        A caller who hangs up does not stop it.
        """
        self.check_ready()
        adding = asyncio.create_task(self._pairs.add(source))
        self._tasks.add(adding)
        adding.add_done_callback(self._added)
        return await asyncio.shield(adding)

    def _added(self, adding: "asyncio.Task[ModelCard]") -> None:
        self._tasks.discard(adding)
        if not adding.cancelled():
            adding.exception()  # told by whoever waits for it, or by the log

    def remove(self, name: str) -> None:
        """Serve a pair no more; its waiting requests are still answered. Raises RequestError."""
        self.check_ready()
        self._pairs.remove(name)

    async def _start(self) -> None:
        try:
            for settings in first_pairs(self.settings):
                await self._pairs.start(settings)
        except LoadingStoppedError:
            return
        except (CheckpointError, SettingsError) as error:
            log.error("%s", error)
            self._fail(str(error))
            return
        except Exception as error:
            log.exception("loading failed")
            self._fail(repr(error))
            return
        if self.state == "starting":
            self.state = "ready"
            for card in self._pairs.cards:
                log.info("ready: %s", card.model_dump_json())

    async def _run(self) -> None:
        """The queue's loop, watched: where it ends before it was told to, nothing is answered here any more."""
        try:
            await self.batcher.run()
        except Exception as error:
            log.exception("the queue broke")
            self._fail(repr(error))
            return
        if self.state not in {"draining", "failed"}:
            log.error("the queue ended before it was told to")
            self._fail("the queue ended before it was told to")

    def _fail(self, message: str) -> None:
        self.state, self.progress = "failed", message
        self.on_failure()

    def _report(self, message: str) -> None:
        if self.state in {"draining", "failed"}:
            raise LoadingStoppedError
        self.progress = message
        log.info("%s", message)
