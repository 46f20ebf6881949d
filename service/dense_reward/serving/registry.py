"""The pairs that are served, by name: loaded, put in each other's place, and removed."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from dense_reward.batching.batcher import Batcher
from dense_reward.batching.worker_threads import WorkerThreads
from dense_reward.errors import RETRY_UNAVAILABLE_S, CheckpointError, LoadingStoppedError, refuse
from dense_reward.records import RemoteEngine
from dense_reward.schemas import ModelCard
from dense_reward.scoring.items import Limits
from dense_reward.scoring.score_cache import ScoreCache
from dense_reward.scoring.scorer import Scorer
from dense_reward.serving.loaders import LoadedPair, LoadPair
from dense_reward.serving.pair_sources import PairSource, check_confined
from dense_reward.settings import Settings
from dense_reward.telemetry.metrics import Metrics

log = logging.getLogger("dense_reward")


@dataclass(slots=True)
class Registry:
    """Served pairs, the first one first; all of them are fed through one queue.

    `loading` names the pair that is being loaded over HTTP. `report` is told each step of a loading, and raises
    LoadingStoppedError to end it.
    """

    settings: Settings
    load: LoadPair
    batcher: Batcher
    metrics: Metrics
    threads: WorkerThreads
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
        """Why a pair computes nothing now, though it may again."""
        return next((found for found in map(_unavailable_reason, self._pairs.values()) if found is not None), None)

    def memory_bytes(self) -> Mapping[str, int]:
        """What is held on each device that has a memory of its own."""
        return self._memory_bytes()

    def scorer(self, name: str | None = None) -> Scorer:
        """The pair of that name; the first one where left out. Some pair must be served. Raises RequestError."""
        if name is None:
            name = next(iter(self._pairs))
        if name not in self._pairs:
            raise refuse("model_not_found", f"no model {name!r}; served: {', '.join(self._pairs)}", param="model")
        return self._pairs[name]

    def check_well(self, name: str | None) -> None:
        """Raises RequestError(engine_unavailable) where nobody answers who computes the pair's models."""
        unavailable_reason = _unavailable_reason(self.scorer(name))
        if unavailable_reason is not None:
            raise refuse("engine_unavailable", unavailable_reason, retry_after_s=RETRY_UNAVAILABLE_S)

    async def start(self, settings: Settings) -> None:
        """LoadPair a pair and serve it. Raises what loading raises."""
        self._pairs[settings.name] = await self._loaded(settings)

    async def add(self, source: PairSource) -> ModelCard:
        """LoadPair a pair beside those that are served, prove it, and serve it from the next request on.

        It takes the place of the pair of its name, which still answers the requests that wait for it.
        Raises RequestError (forbidden, loading, load_failed, draining), nothing having changed.
        """
        if self.settings.engine in {"remote", "vllm"}:
            raise refuse("forbidden", f"pairs of --engine {self.settings.engine} are served from the start alone")
        if self.settings.checkpoints_folder is None:
            raise refuse(
                "forbidden", "pairs are loaded over HTTP only from below --checkpoints-folder, which is not set"
            )
        if self.loading is not None:
            raise refuse("loading", f"{self.loading} is being loaded: one at a time", retry_after_s=RETRY_UNAVAILABLE_S)
        self.loading = source.name
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

    def remove(self, name: str) -> None:
        """Serve a pair no more; its waiting requests are still answered. Raises RequestError."""
        if self.scorer(name) is self.scorer():
            raise refuse("in_use", f"{name} answers requests that name no model: load another pair in its place")
        del self._pairs[name]
        log.info("removed: %s", name)

    def close(self) -> None:
        """LoadPair no more, what is being loaded not waited for, and let go of engines elsewhere."""
        self._loader.shutdown(wait=False)
        for scorer in self._pairs.values():
            if isinstance(scorer.engine, RemoteEngine):
                scorer.engine.close()

    async def _loaded(self, settings: Settings) -> Scorer:
        loaded = await asyncio.get_running_loop().run_in_executor(self._loader, self._load, settings)
        self._memory_bytes = loaded.memory_bytes
        return self._scorer_of(settings, loaded)

    def _load(self, settings: Settings) -> LoadedPair:
        check_confined(settings)
        return self.load(settings, self.report, self.batcher.on_device)

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
            revision=info.revision,
            tokenizer_sha256=loaded.tokenizer_sha256,
            renderer=loaded.encoder.renderer,
            end_of_turn_id=loaded.encoder.end_of_turn_id,
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
            self.threads,
        )


def _unavailable_reason(scorer: Scorer) -> str | None:
    return scorer.engine.unavailable_reason if isinstance(scorer.engine, RemoteEngine) else None
