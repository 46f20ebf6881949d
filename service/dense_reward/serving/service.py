"""The service: its queue, its pairs and its state, from start to stop."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Thread
from typing import Literal

from dense_reward.batching.batcher import Batcher
from dense_reward.batching.worker_threads import Lanes
from dense_reward.errors import RETRY_UNAVAILABLE_S, CheckpointError, LoadingStoppedError, SettingsError, refuse
from dense_reward.schemas import ModelCard
from dense_reward.scoring.scorer import Scorer
from dense_reward.serving.loaders import LoadPair
from dense_reward.serving.pair_sources import PairSource, first_pairs
from dense_reward.serving.registry import Registry
from dense_reward.settings import Settings
from dense_reward.telemetry.metrics import Metrics, MetricsSnapshot
from dense_reward.telemetry.process_memory import release_freed_memory
from dense_reward.telemetry.tracing import Tracing

log = logging.getLogger("dense_reward")
STUCK_S = 30.0
"""No other request is encoded while each thread is busy with one for longer than this."""
LARGE_BODY_BYTES, RELEASE_MEMORY_S = 1024 * 1024, 10.0
State = Literal["starting", "ready", "draining", "failed"]


@dataclass(slots=True)
class Service:
    """Pairs that share one queue. Used from one event loop.

    The state goes from starting to ready once all first pairs are loaded and verified, then to draining. It becomes
    failed if a first pair cannot be loaded or the queue breaks: `on_failure` is then called, to end the process.
    """

    settings: Settings
    load: LoadPair
    on_failure: Callable[[], None]
    metrics: Metrics = field(default_factory=Metrics)
    state: State = "starting"
    progress: str = "waiting for the first step"
    tracing: Tracing | None = field(init=False)
    lanes: Lanes = field(default_factory=Lanes)
    batcher: Batcher = field(init=False)
    _pairs: Registry = field(init=False)
    _tasks: "set[asyncio.Task[None] | asyncio.Task[ModelCard]]" = field(default_factory=set)
    _stop_at_s: float = math.inf
    _releases_memory: bool = False

    def __post_init__(self) -> None:
        self.batcher = Batcher(
            self.metrics,
            max_batch_tokens=self.settings.max_batch_tokens,
            max_queue_tokens=self.settings.max_queue_tokens,
        )
        self._pairs = Registry(self.settings, self.load, self.batcher, self.metrics, self.lanes, self._report)
        endpoint = self.settings.otlp_endpoint
        self.tracing = None if endpoint is None else Tracing(endpoint)

    def start(self) -> None:
        """Start the queue and the loading of the first pairs, and return immediately."""
        self._tasks |= {asyncio.create_task(self._run()), asyncio.create_task(self._start())}

    async def loaded(self) -> None:
        """Return once the first pairs are served. Raises RuntimeError if the service fails before."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)  # the loading, or a queue that broke
        if self.state == "failed":
            raise RuntimeError(self.progress)

    def drain(self) -> None:
        """Admit no more requests, and cancel loading at its next step. The time of --drain-s starts now."""
        if self.state != "failed":
            self.state = "draining"
        self._stop_at_s = min(self._stop_at_s, time.monotonic() + self.settings.drain_s)

    async def stop(self) -> None:
        """Finish admitted work, but return at the end of --drain-s at the latest. `is_busy` is then true."""
        self.drain()
        self.batcher.close()
        await asyncio.wait(self._tasks, timeout=max(0.0, self._stop_at_s - time.monotonic()))
        if self.is_busy:
            log.warning("stopped before all work was done (--drain-s)")
        self.lanes.shutdown()
        self._pairs.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    @property
    def is_busy(self) -> bool:
        """Whether a batch is being computed or a pair loaded."""
        return not all(task.done() for task in self._tasks)

    @property
    def loading(self) -> str | None:
        """The name of the pair that is being loaded over HTTP."""
        return self._pairs.loading

    @property
    def unavailable_reason(self) -> str | None:
        """Why the service or a pair cannot compute now, although it may recover; None if all can."""
        if self.lanes.small.are_stuck(STUCK_S):
            return f"requests cannot be encoded: each thread has been busy with one of them for {STUCK_S:.0f} s"
        return self._pairs.unavailable_reason

    def release_memory_after(self, body_bytes: int) -> None:
        """After a large body, give the memory that it took back to the system: soon, and once for several bodies."""
        if body_bytes > LARGE_BODY_BYTES and not self._releases_memory:
            self._releases_memory = True
            asyncio.get_running_loop().call_later(RELEASE_MEMORY_S, self._release_memory)

    def _release_memory(self) -> None:
        self._releases_memory = False
        Thread(target=release_freed_memory, name="release_memory", daemon=True).start()

    def check_ready(self) -> None:
        """Raises RequestError(starting or draining), with Retry-After, unless the state is ready."""
        if self.state != "ready":
            code = "draining" if self.state == "draining" else "starting"
            message = f"the service is not ready (state {self.state}): try again later"
            raise refuse(code, message, retry_after_s=RETRY_UNAVAILABLE_S)

    def scorer(self, name: str | None = None) -> Scorer:
        """The pair of a name, or the first pair, for an admitted request: also while draining.

        Raises RequestError: model_not_found, engine_unavailable, or as check_ready if no pair is loaded yet.
        """
        if self._pairs.is_empty:
            self.check_ready()
        self._pairs.check_available(name)
        return self._pairs.scorer(name)

    def cards(self) -> list[ModelCard]:
        """The cards of all pairs, in order. Raises RequestError as check_ready."""
        self.check_ready()
        return self._pairs.cards

    def snapshot(self) -> MetricsSnapshot:
        """The current numbers for the metrics."""
        return MetricsSnapshot(
            ready=self.state == "ready" and self.unavailable_reason is None,
            queue_tokens=self.batcher.admission.held_tokens,
            tokens_per_s=self.batcher.admission.rate_tokens_per_s,
            revisions={card.name: card.revision for card in self._pairs.cards},
            memory_bytes=self._pairs.memory_bytes(),
            results_bytes=self._pairs.results.kept_bytes,
        )

    async def add(self, source: PairSource) -> ModelCard:
        """Load and serve a pair: see Registry.add. Raises RequestError.

        Loading continues if the caller disconnects: it is shielded from the cancellation of the request.
        """
        self.check_ready()
        adding = asyncio.create_task(self._pairs.add(source))
        self._tasks.add(adding)
        adding.add_done_callback(self._added)
        return await asyncio.shield(adding)

    def _added(self, adding: "asyncio.Task[ModelCard]") -> None:
        self._tasks.discard(adding)
        if not adding.cancelled():
            # Marks the error as retrieved, or asyncio would log it: the caller gets it, and the registry logged it.
            adding.exception()

    def remove(self, name: str) -> None:
        """Stop serving a pair: see Registry.remove. Raises RequestError."""
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
            log.exception("loading failed unexpectedly")
            self._fail(repr(error))
            return
        if self.state == "starting":
            self.state = "ready"
            for card in self._pairs.cards:
                log.info("ready: %s", card.model_dump_json())

    async def _run(self) -> None:
        """Run the batcher's loop, and fail if it ends before the service drains: requests would get no answer."""
        try:
            await self.batcher.run()
        except Exception as error:
            log.exception("the queue failed")
            self._fail(repr(error))
            return
        if self.state not in {"draining", "failed"}:
            message = "the queue ended although the service was not stopped"
            log.error(message)
            self._fail(message)

    def _fail(self, message: str) -> None:
        self.state, self.progress = "failed", message
        self.on_failure()

    def _report(self, message: str) -> None:
        """Called on the loading thread with each step. Raising here is how loading is cancelled."""
        if self.state in {"draining", "failed"}:
            raise LoadingStoppedError
        self.progress = message
        log.info("%s", message)
