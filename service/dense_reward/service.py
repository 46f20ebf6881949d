"""What lives as long as the process: the queue, the pairs that are served, and the state that /ready tells."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from dense_reward.batcher import Batcher
from dense_reward.beside import Beside
from dense_reward.encode import Encoder
from dense_reward.engine.base import Engine, OnDevice
from dense_reward.errors import RETRY_UNAVAILABLE_S, CheckpointError, LoadingStoppedError, SettingsError, refuse
from dense_reward.items import Limits
from dense_reward.metrics import Metrics, Told
from dense_reward.pairs import PairSource, check_confined, first_pairs
from dense_reward.results import Results
from dense_reward.schemas import ModelCard
from dense_reward.scorer import Scorer
from dense_reward.settings import Settings
from dense_reward.tracing import Tracing

log = logging.getLogger("dense_reward")
State = Literal["starting", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading gives: an engine that has been proven, and the encoder that its checkpoints were trained with.

    `memory_bytes` tells what is held on each device where that is not the process's own memory.
    """

    engine: Engine
    encoder: Encoder
    tokenizer_sha256: str
    memory_bytes: Callable[[], Mapping[str, int]] = dict


Load = Callable[[Settings, Callable[[str], None], OnDevice], Loaded]
"""Loads the pair of the settings' name, sft and reference, beside those that are served."""


@dataclass(slots=True)
class Service:
    """Pairs behind one queue. `start` returns at once; /ready is true only after the proof of all first pairs."""

    settings: Settings
    load: Load
    on_failure: Callable[[], None]
    metrics: Metrics = field(default_factory=Metrics)
    state: State = "starting"
    progress: str = "waiting for the first step"
    loading: str | None = None
    tracing: Tracing | None = field(init=False)
    threads: Beside = field(default_factory=lambda: Beside(2, "encode"))
    batcher: Batcher = field(init=False)
    _results: Results = field(init=False)
    _pairs: dict[str, Scorer] = field(default_factory=dict)
    _memory_bytes: Callable[[], Mapping[str, int]] = dict
    _tasks: "set[asyncio.Task[None] | asyncio.Task[ModelCard]]" = field(default_factory=set)
    _stop_at_s: float = math.inf
    _loader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="load"))

    def __post_init__(self) -> None:
        self.batcher = Batcher(
            self.metrics,
            max_batch_tokens=self.settings.max_batch_tokens,
            max_queue_tokens=self.settings.max_queue_tokens,
        )
        self._results = Results(self.settings.results_bytes, self.metrics)
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
        self._loader.shutdown(wait=False)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    @property
    def is_busy(self) -> bool:
        """Whether something is being computed or loaded."""
        return not all(task.done() for task in self._tasks)

    def check_ready(self) -> None:
        """Raises RequestError: starting or draining, with the seconds after which to ask again."""
        if self.state != "ready":
            code = "draining" if self.state == "draining" else "starting"
            raise refuse(code, f"the service is {self.state}", retry_after_s=RETRY_UNAVAILABLE_S)

    def scorer(self, name: str | None = None) -> Scorer:
        """The pair of that name; the first one where left out. For requests that were let in. Raises RequestError."""
        if not self._pairs:
            self.check_ready()
        if name is None:
            return next(iter(self._pairs.values()))
        if name not in self._pairs:
            raise refuse("model_not_found", f"no model {name!r}; served: {', '.join(self._pairs)}", param="model")
        return self._pairs[name]

    def cards(self) -> list[ModelCard]:
        """Of every pair, the first one first. Raises RequestError where /score would for any."""
        self.check_ready()
        return [scorer.card for scorer in self._pairs.values()]

    def told(self) -> Told:
        """What metrics tell of this moment."""
        return Told(
            ready=self.state == "ready",
            queue_tokens=self.batcher.door.held_tokens,
            tokens_per_s=self.batcher.door.rate_tokens_per_s,
            revisions={name: scorer.card.revision for name, scorer in self._pairs.items()},
            memory_bytes=self._memory_bytes(),
            results_bytes=self._results.kept_bytes,
        )

    async def add(self, source: PairSource) -> ModelCard:
        """Load a pair beside those that are served, prove it, and serve it from the next request on.

        It takes the place of the pair of its name, which still answers the requests that wait for it.
        Raises RequestError (load_failed, loading), nothing having changed. A caller who hangs up does not stop it.
        """
        self.check_ready()
        if self.settings.checkpoints_folder is None:
            raise refuse(
                "forbidden", "pairs are loaded over HTTP only from below --checkpoints-folder, which is not set"
            )
        if self.loading is not None:
            raise refuse("loading", f"{self.loading} is being loaded: one at a time", retry_after_s=RETRY_UNAVAILABLE_S)
        self.loading = source.name
        adding = asyncio.create_task(self._add(source))
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
        if self.scorer(name) is self.scorer():
            raise refuse("in_use", f"{name} answers requests that name no model: load another pair in its place")
        del self._pairs[name]
        log.info("removed: %s", name)

    async def _start(self) -> None:
        try:
            for settings in first_pairs(self.settings):
                self._pairs[settings.name] = await self._loaded(settings)
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
            for scorer in self._pairs.values():
                log.info("ready: %s", scorer.card.model_dump_json())

    async def _add(self, source: PairSource) -> ModelCard:
        try:
            scorer = await self._loaded(self.settings.model_copy(update=source.model_dump()))
        except LoadingStoppedError:
            raise refuse("draining", "the service is stopping", retry_after_s=RETRY_UNAVAILABLE_S) from None
        except Exception as error:  # whatever a checkpoint can do wrong must not reach those that are served
            self.metrics.load("failed")
            log.error("%s could not be loaded: %s", source.name, error, exc_info=not isinstance(error, CheckpointError))
            raise refuse("load_failed", f"{error}; what was served before is served on") from None
        finally:
            self.loading = None
        self._pairs[source.name] = scorer
        self.metrics.load("switched")
        log.info("switched: %s", scorer.card.model_dump_json())
        return scorer.card

    async def _loaded(self, settings: Settings) -> Scorer:
        loop = asyncio.get_running_loop()
        loaded = await loop.run_in_executor(self._loader, self._load, settings)
        self._memory_bytes = loaded.memory_bytes
        return self._scorer_of(settings, loaded)

    def _load(self, settings: Settings) -> Loaded:
        check_confined(settings)
        return self.load(settings, self._report, self.batcher.on_device)

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

    def _scorer_of(self, settings: Settings, loaded: Loaded) -> Scorer:
        info = loaded.engine.info
        longest = settings.max_length_tokens or info.max_length_tokens
        if longest > info.max_length_tokens:
            limit = f"the models' limit is {info.max_length_tokens}"
            raise CheckpointError(f"--max-length-tokens {longest} is too many, {limit}: lower it, or leave it out")
        card = ModelCard(
            name=settings.name,
            sft=info.sft,
            reference=info.reference,
            revision=info.revision,
            tokenizer_sha256=loaded.tokenizer_sha256,
            renderer=loaded.encoder.renderer,
            end_of_turn_id=loaded.encoder.end_of_turn_id,
            dtype=info.dtype,
            device=info.device,
            vocabulary=info.vocabulary,
            max_length_tokens=longest,
            quantities=sorted(info.quantities),
            related=info.related,
        )
        limits = Limits(info.vocabulary, longest, settings.max_responses, settings.max_json_depth)
        return Scorer(
            card,
            loaded.encoder,
            loaded.engine,
            self.batcher,
            limits,
            settings.max_items,
            self._results,
            self.metrics,
            self.threads,
        )


def load_fake(settings: Settings, report: Callable[[str], None], _: OnDevice) -> Loaded:
    """The weightless engine."""
    from dense_reward.engine.fake import FakeEngine, FakeTokenizer  # noqa: PLC0415 - the served engine is chosen here

    report("the fake engine computes numbers that mean nothing")
    return Loaded(FakeEngine(), Encoder.of(FakeTokenizer(), "plain"), "fake")


def torch_loader() -> Load:
    """Loads checkpoints; those that two pairs share once."""
    from dense_reward.engine.start import DeviceLoader, gpu_bytes  # noqa: PLC0415 - torch is imported only to serve

    loader = DeviceLoader()

    def load(settings: Settings, report: Callable[[str], None], on_device: OnDevice) -> Loaded:
        return Loaded(*loader.load(settings, report, on_device), memory_bytes=gpu_bytes)

    return load
