"""What lives as long as the process: the loading of a pair, its scorer, and the state that /ready tells."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from dense_reward.batcher import Batcher
from dense_reward.encode import Encoder
from dense_reward.engine.base import Engine
from dense_reward.errors import RETRY_UNAVAILABLE_S, CheckpointError, refuse
from dense_reward.items import Limits
from dense_reward.metrics import Metrics
from dense_reward.schemas import ModelCard
from dense_reward.scorer import Scorer
from dense_reward.settings import Settings

log = logging.getLogger("dense_reward")
State = Literal["starting", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading gives: an engine that has been proven, and the encoder that its checkpoints were trained with."""

    engine: Engine
    encoder: Encoder
    tokenizer_sha256: str


Load = Callable[[Settings, Callable[[str], None]], Loaded]


class LoadingStoppedError(Exception):
    """Nobody waits for the pair any more."""


@dataclass(slots=True)
class Service:
    """One pair behind one queue. `start` returns at once; /ready is true only after the proof."""

    settings: Settings
    load: Load
    on_failure: Callable[[], None]
    metrics: Metrics = field(default_factory=Metrics)
    state: State = "starting"
    progress: str = "waiting for the first step"
    _scorer: Scorer | None = None
    _tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="encode"))

    def start(self) -> None:
        self._tasks.append(asyncio.create_task(self._start()))

    async def stop(self) -> None:
        """Finish what was let in, then return. Loading that is under way ends at its next step."""
        if self.state != "failed":
            self.state = "draining"
        if self._scorer is not None:
            self._scorer.batcher.close()
        await asyncio.gather(*self._tasks)
        self._threads.shutdown()

    @property
    def scorer(self) -> Scorer:
        """Raises RequestError: starting or draining, with the seconds after which to ask again."""
        if self._scorer is None or self.state != "ready":
            code = "draining" if self.state == "draining" else "starting"
            raise refuse(code, f"the service is {self.state}", retry_after_s=RETRY_UNAVAILABLE_S)
        return self._scorer

    def queue_tokens(self) -> int:
        return 0 if self._scorer is None else self._scorer.batcher.door.held_tokens

    async def _start(self) -> None:
        try:
            loaded = await asyncio.get_running_loop().run_in_executor(
                self._threads, self.load, self.settings, self._report
            )
            scorer = self._make_scorer(loaded)
        except LoadingStoppedError:
            return
        except CheckpointError as error:
            log.error("%s", error)
            self._fail(str(error))
            return
        except Exception as error:
            log.exception("loading failed")
            self._fail(repr(error))
            return
        if self.state == "draining":
            return
        self._scorer = scorer
        self._tasks.append(asyncio.create_task(self._run(scorer.batcher)))
        self.state = "ready"
        log.info("ready: %s", scorer.card.model_dump_json())

    async def _run(self, batcher: Batcher) -> None:
        """The queue's loop, watched: where it ends before it was told to, nothing is answered here any more."""
        try:
            await batcher.run()
        except Exception as error:
            log.exception("the queue broke")
            self._fail(repr(error))
            return
        if self.state != "draining":
            log.error("the queue ended before it was told to")
            self._fail("the queue ended before it was told to")

    def _fail(self, message: str) -> None:
        self.state, self.progress = "failed", message
        self.on_failure()

    def _report(self, message: str) -> None:
        if self.state == "draining":
            raise LoadingStoppedError
        self.progress = message
        log.info("%s", message)

    def _make_scorer(self, loaded: Loaded) -> Scorer:
        settings, info = self.settings, loaded.engine.info
        longest = settings.max_length_tokens or info.max_length_tokens
        if longest > info.max_length_tokens:
            limit = f"the models' limit is {info.max_length_tokens}"
            raise CheckpointError(f"--max-length-tokens {longest} is too many, {limit}: lower it, or leave it out")
        batcher = Batcher(
            loaded.engine,
            self.metrics,
            max_batch_tokens=settings.max_batch_tokens,
            max_queue_tokens=settings.max_queue_tokens,
        )
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
        return Scorer(card, loaded.encoder, batcher, limits, settings.max_items, self.metrics, self._threads)


def load_fake(settings: Settings, report: Callable[[str], None]) -> Loaded:
    """The weightless engine."""
    from dense_reward.engine.fake import FakeEngine, FakeTokenizer  # noqa: PLC0415 - the served engine is chosen here

    report("the fake engine computes numbers that mean nothing")
    return Loaded(FakeEngine(), Encoder.of(FakeTokenizer(), "plain"), "fake")


def load_torch(settings: Settings, report: Callable[[str], None]) -> Loaded:
    """The two checkpoints of the settings. Raises CheckpointError."""
    from dense_reward.engine.start import load_pair_on_device  # noqa: PLC0415 - torch is imported only to serve

    return Loaded(*load_pair_on_device(settings, report))
