"""The registry of served pairs: loads, replaces and removes them by name while requests are served."""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from dense_reward.batching.batcher import Batcher
from dense_reward.batching.worker_threads import Lanes
from dense_reward.errors import RETRY_UNAVAILABLE_S, CheckpointError, LoadingStoppedError, engine_unavailable, refuse
from dense_reward.records import RemoteEngine
from dense_reward.schemas import ModelCard
from dense_reward.scoring.items import Limits
from dense_reward.scoring.score_cache import ScoreCache
from dense_reward.scoring.scorer import Scorer
from dense_reward.serving.loaders import LoadedPair, LoadPair
from dense_reward.serving.pair_sources import PairSource, check_confined, try_texts_of
from dense_reward.settings import Settings
from dense_reward.telemetry.metrics import Metrics
from dense_reward.telemetry.process_memory import collect_replaced

log = logging.getLogger("dense_reward")
MAX_NAME = 100
"""Maximum number of characters of an unknown name that an error repeats."""
LOADING_NICENESS, LEAST_PRIORITY = 10, 19
"""How much nicer than the process its loading thread is, and the limit of Linux."""
LOADING_SWITCH_S = 0.0005
"""Seconds after which a thread in Python gives way while a pair is loaded; by default 5 ms, once for each step of a
request."""


@dataclass(slots=True)
class Registry:
    """The served pairs in order; the first answers requests that name no model. All share one batcher.

    All methods run on the event loop, so a lookup never sees a half-made change; only `load` runs on the loading
    thread. A request keeps the Scorer that it looked up, and so the models: one revision answers it even if its pair is
    replaced or removed meanwhile. Models are freed with the last Scorer that uses them.

    `loading` is the name of the pair that is being loaded over HTTP. `report` is called with each step of loading; it
    raises LoadingStoppedError to cancel it.
    """

    settings: Settings
    load: LoadPair
    batcher: Batcher
    metrics: Metrics
    lanes: Lanes
    report: Callable[[str], None]
    loading: str | None = None
    results: ScoreCache = field(init=False)
    _pairs: dict[str, Scorer] = field(default_factory=dict)
    _memory_bytes: Callable[[], Mapping[str, int]] = dict
    _loader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="load"))

    def __post_init__(self) -> None:
        self.results = ScoreCache(self.settings.results_bytes, self.metrics)

    @property
    def is_empty(self) -> bool:
        return not self._pairs

    @property
    def cards(self) -> list[ModelCard]:
        return [scorer.card for scorer in self._pairs.values()]

    @property
    def unavailable_reason(self) -> str | None:
        """Why a pair cannot compute now, although it may recover; None if all can."""
        reasons = map(_unavailable_reason, self._pairs.values())
        return next((reason for reason in reasons if reason is not None), None)

    def memory_bytes(self) -> Mapping[str, int]:
        """Bytes held on each device that has its own memory."""
        return self._memory_bytes()

    def scorer(self, name: str | None = None) -> Scorer:
        """The pair of a name, or the first pair. At least one must be served. Raises RequestError(model_not_found)."""
        if name is None:
            name = next(iter(self._pairs))
        if name not in self._pairs:
            message = f"there is no model {name[:MAX_NAME]!r}; served: {', '.join(self._pairs)}"
            raise refuse("model_not_found", message, param="model")
        return self._pairs[name]

    def check_available(self, name: str | None) -> None:
        """Raises RequestError(engine_unavailable) if the pair's engine cannot compute now."""
        if _unavailable_reason(self.scorer(name)) is not None:
            raise engine_unavailable()

    async def start(self, settings: Settings) -> None:
        """Load a pair at the start of the service, and serve it. Raises what loading raises."""
        self._pairs[settings.name] = await self._loaded(settings)

    async def add(self, source: PairSource) -> ModelCard:
        """Load a pair while the others are served, verify its probes, and serve it from the next request on.

        It replaces the pair of the same name, which still answers its current requests.
        Raises RequestError: forbidden, loading, load_failed or draining. Nothing has changed then.
        """
        if self.settings.engine in {"remote", "vllm"}:
            message = f"--engine {self.settings.engine} loads pairs only at its start: restart it with other settings"
            raise refuse("forbidden", message)
        if self.settings.checkpoints_folder is None:
            raise refuse("forbidden", "loading pairs over HTTP needs --checkpoints-folder DIR: only from there")
        if self.loading is not None:
            message = f"{self.loading} is being loaded, and pairs are loaded one at a time: try again later"
            raise refuse("loading", message, retry_after_s=RETRY_UNAVAILABLE_S)
        self.loading = source.name
        usual_s = sys.getswitchinterval()
        sys.setswitchinterval(min(usual_s, LOADING_SWITCH_S))
        try:
            scorer = await self._loaded(self.settings.model_copy(update=source.model_dump()), beside=True)
        except LoadingStoppedError:
            raise refuse("draining", "the service is stopping", retry_after_s=RETRY_UNAVAILABLE_S) from None
        except Exception as error:  # a bad checkpoint can raise anything, and the pairs that are served must go on
            self.metrics.load("failed")
            log.error("%s could not be loaded: %s", source.name, error, exc_info=not isinstance(error, CheckpointError))
            # A text, because a local that refers to the error makes a cycle, and what was loaded would not be freed.
            reason = str(error) if isinstance(error, CheckpointError) else f"it cannot be loaded ({error!r})"
            raise refuse("load_failed", f"{reason} (the pairs that were served before are still served)") from None
        finally:
            self.loading = None
            sys.setswitchinterval(usual_s)
        self._pairs[source.name] = scorer
        collect_replaced()
        self.metrics.load("switched")
        log.info("switched: %s", scorer.card.model_dump_json())
        return scorer.card

    def remove(self, name: str) -> None:
        """Stop serving a pair. Its requests are still answered. Raises RequestError: model_not_found or in_use."""
        if self.scorer(name) is self.scorer():
            raise refuse(
                "in_use", f"{name} answers requests without a model: load another pair under this name instead"
            )
        del self._pairs[name]
        collect_replaced()
        log.info("removed: %s", name)

    def close(self) -> None:
        """Load no more pairs, without waiting for one that is being loaded, and close remote engines."""
        self._loader.shutdown(wait=False)
        for scorer in self._pairs.values():
            if isinstance(scorer.engine, RemoteEngine):
                scorer.engine.close()

    async def _loaded(self, settings: Settings, *, beside: bool = False) -> Scorer:
        """`beside`: other pairs are served meanwhile."""
        loaded = await asyncio.get_running_loop().run_in_executor(self._loader, self._load, settings, beside)
        self._memory_bytes = loaded.memory_bytes
        return self._scorer_of(settings, loaded)

    def _load(self, settings: Settings, beside: bool) -> LoadedPair:
        try:
            check_confined(settings)
            if beside:
                _give_way()
                try_texts_of(settings)
            return self.load(settings, self.report, self.batcher.on_device)
        except Exception:
            raise
        except BaseException as error:  # a panic of a library in Rust, which is no Exception
            raise CheckpointError(f"a library failed on {settings.name} ({error}): copy its files again") from error

    def _scorer_of(self, settings: Settings, loaded: LoadedPair) -> Scorer:
        info = loaded.engine.info
        longest = settings.max_length_tokens or info.max_length_tokens
        if longest > info.max_length_tokens:
            limit = f"the models' limit is {info.max_length_tokens}"
            raise CheckpointError(f"--max-length-tokens {longest} is too many, {limit}: lower it, or leave it out")
        card = ModelCard(
            name=settings.name,
            sft=info.sft,
            reference=info.reference,
            token_head=info.token_head,
            revision=info.revision,
            tokenizer_sha256=loaded.tokenizer_sha256,
            renderer=loaded.encoder.renderer,
            end_of_turn_id=loaded.encoder.end_of_turn_id,
            template_kwargs=dict(loaded.encoder.choices.template_kwargs),
            response_prefix=loaded.encoder.choices.response_prefix,
            template_date=loaded.encoder.choices.template_date,
            text_refused=loaded.encoder.undecided("flags"),
            dtype=info.dtype,
            device=info.device,
            vocabulary=info.vocab_size,
            max_length_tokens=longest,
            quantities=sorted(info.quantities),
            related=info.related,
        )
        limits = Limits(info.vocab_size, longest, settings.max_responses, settings.max_json_depth)
        return Scorer(
            card,
            loaded.encoder,
            loaded.engine,
            self.batcher,
            limits,
            settings.max_items,
            self.results,
            self.metrics,
            self.lanes,
            loaded.taught_by,
        )


def _give_way() -> None:
    """Let the threads that answer requests have the processors first: lower the priority of this one and its children.

    Linux has a priority for each thread. Without privileges it cannot be raised again, so this is for a thread that
    only loads.
    """
    if sys.platform == "linux":
        niceness = os.getpriority(os.PRIO_PROCESS, os.getpid()) + LOADING_NICENESS
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(niceness, LEAST_PRIORITY))


def _unavailable_reason(scorer: Scorer) -> str | None:
    return scorer.engine.unavailable_reason if isinstance(scorer.engine, RemoteEngine) else None
