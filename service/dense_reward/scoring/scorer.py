"""The whole flow of a request: check, encode, submit, reward, describe. Knows no HTTP and no device."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dense_reward.batching.admission import Permit
from dense_reward.batching.batcher import Batcher, Computed, cost_tokens
from dense_reward.batching.scheduler import Terms
from dense_reward.batching.worker_threads import WorkerThreads
from dense_reward.errors import Fault, RequestError, refuse
from dense_reward.records import Engine, FloatArray, Scores, TokenScores, Trunk
from dense_reward.reward import reward
from dense_reward.schemas import ModelCard, ScoreRequest
from dense_reward.scoring.items import Limits, PreparedItem, prepare
from dense_reward.scoring.rows import Describer, Row, wants
from dense_reward.scoring.score_cache import Scope, ScoreCache, keys_of
from dense_reward.telemetry.metrics import Metrics
from dense_reward.telemetry.running_stats import RunningStats
from dense_reward.text.encode import Encoder

MAX_ALTERNATIVES = 1_000_000
"""Scored tokens times top_k of one request: each is an object of the answer."""
SMALL_REQUEST_TOKENS = 20_000
"""Hashed at once: more would hold up every other request."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request gets: rows, and the faults of items under on_error per_item."""

    rows: list[Row]
    faults: list[Fault]
    prompt_tokens: int
    response_tokens: int
    scored_tokens: int
    timing_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Scorer:
    """One served pair."""

    card: ModelCard
    encoder: Encoder
    engine: Engine
    batcher: Batcher
    limits: Limits
    max_items: int
    results: ScoreCache
    metrics: Metrics
    threads: WorkerThreads

    async def score(
        self,
        request: ScoreRequest,
        permit: Permit,
        *,
        group: str | None = None,
        max_drawn_tokens: int | None = None,
    ) -> Answer:
        """Answer a request. Raises RequestError with every bad item, unless on_error is per_item.

        Work is shared with other requests of `group`: of None with each other.

        Where `max_drawn_tokens` is set, the answer is to be drawn, and more tokens than that, a prompt counted with
        each of its responses, are refused as too_long.
        """
        self._check(request)
        clock = time.perf_counter
        started = clock()
        prepared, faults = await self.threads.run(self._prepare, request)
        if faults and request.on_error == "fail":
            raise RequestError(faults)
        _check_answer(request, prepared.values(), max_drawn_tokens)
        trunks = [item.trunk for item in prepared.values()]
        permit.correct(cost_tokens(self.engine, trunks))
        encoded = clock()
        computed = await self._scores(request, trunks, group)
        done = clock()
        described = await self.threads.run(self._describe, request, prepared, computed.scores)
        rows, broken, rewards = described
        self.metrics.scored(self.card.name, rewards)
        self.metrics.non_finite(self.card.name, len(broken))
        if broken and request.on_error == "fail":
            raise RequestError(broken)
        timing_s = {
            "encode_s": encoded - started,
            "queue_s": computed.queue_s,
            "compute_s": computed.compute_s,
            "describe_s": clock() - done,
            "total_s": clock() - started,
        }
        return self._answer(rows, faults + broken, list(prepared.values()), timing_s)

    async def _scores(self, request: ScoreRequest, trunks: Sequence[Trunk], group: str | None) -> Computed:
        """Nothing is computed that is known, or that is being computed for somebody who may share it."""
        wanted, terms = wants(request), Terms(request.priority == "bulk", group)
        spent = Computed([], 0.0, 0.0)

        async def compute(new: Sequence[Trunk]) -> Scores:
            nonlocal spent
            spent = await self.batcher.submit(self.engine, new, wanted, terms)
            return spent.scores

        scope = Scope(self.card.revision, group)
        if sum(trunk.tokens for trunk in trunks) <= SMALL_REQUEST_TOKENS:
            keys = keys_of(trunks, wanted, scope)
        else:
            keys = await self.threads.run(keys_of, trunks, wanted, scope)
        before = time.perf_counter()
        scores = await self.results.of(keys, trunks, compute, bulk=terms.bulk)
        if not spent.scores:  # all of it was known, or waited for
            return Computed(scores, time.perf_counter() - before, 0.0)
        return replace(spent, scores=scores)

    def _check(self, request: ScoreRequest) -> None:
        card = self.card
        if request.tokenizer_sha256 not in (None, card.tokenizer_sha256):
            message = f"this pair has tokenizer {card.tokenizer_sha256}: your ids mean something else here"
            raise refuse("tokenizer_mismatch", message, param="tokenizer_sha256")
        if request.expect_revision not in (None, card.revision):
            message = f"revision {card.revision} is served: the checkpoints were changed"
            raise refuse("revision_mismatch", message, param="expect_revision")
        if request.items is not None and len(request.items) > self.max_items:
            message = f"{len(request.items)} items; the limit is {self.max_items} (--max-items): send them in parts"
            raise refuse("too_long", message, param="items")
        missing = _quantities(request) - set(card.quantities)
        if missing:
            raise refuse("unsupported_by_engine", f"this engine cannot give {', '.join(sorted(missing))}")
        if request.top_k > card.vocabulary:
            message = f"top_k {request.top_k} is more than the vocabulary of {card.vocabulary}"
            raise refuse("invalid_request", message, param="top_k")

    def _prepare(self, request: ScoreRequest) -> tuple[dict[int, PreparedItem], list[Fault]]:
        """The good items by index, and what is wrong with the others."""
        prepared: dict[int, PreparedItem] = {}
        faults: list[Fault] = []
        for index, item in enumerate(request.listed()):
            try:
                prepared[index] = prepare(item, request, self.encoder, self.limits)
            except RequestError as error:
                faults.extend(_of_item(error, index))
        return prepared, faults

    def _describe(
        self, request: ScoreRequest, prepared: dict[int, PreparedItem], scores: Sequence[Sequence[TokenScores]]
    ) -> tuple[list[Row], list[Fault], RunningStats]:
        """The rows of the items whose numbers can be answered, what is wrong with the others, and the rows' rewards."""
        describer = Describer(request, self.encoder.tokenizer)
        rows: list[Row] = []
        faults: list[Fault] = []
        rewards: list[FloatArray] = []
        for (index, item), item_scores in zip(prepared.items(), scores, strict=True):
            try:
                rows.extend(describer.rows(index, item, item_scores))
                rewards.extend(map(reward, item_scores))
            except RequestError as error:
                faults.extend(_of_item(error, index))
        return rows, faults, RunningStats.of(rewards)

    def _answer(
        self, rows: list[Row], faults: list[Fault], items: Sequence[PreparedItem], timing_s: dict[str, float]
    ) -> Answer:
        responses = [response for item in items for response in item.responses]
        scored_tokens = sum(int(response.scored_T.sum()) for response in responses)
        for stage, seconds in timing_s.items():
            self.metrics.stage(stage.removesuffix("_s"), seconds)
        return Answer(
            rows,
            faults,
            sum(len(item.trunk.prompt_P) for item in items),
            sum(len(response.ids_T) for response in responses),
            scored_tokens,
            timing_s,
        )


def _check_answer(request: ScoreRequest, items: Collection[PreparedItem], max_drawn_tokens: int | None) -> None:
    """Raise RequestError(too_long) where the answer would be too large to be written down or drawn."""
    tokens = sum(int(response.scored_T.sum()) for item in items for response in item.responses)
    if tokens * request.top_k > MAX_ALTERNATIVES:
        message = f"top_k {request.top_k} of {tokens} scored tokens are more than {MAX_ALTERNATIVES} alternatives"
        raise refuse("too_long", f"{message}, the limit: lower top_k, or send the items in parts", param="top_k")
    drawn = tokens + sum(len(item.trunk.prompt_P) * len(item.responses) for item in items)
    if max_drawn_tokens is not None and drawn > max_drawn_tokens:
        message = f"a heatmap of {drawn} tokens, prompts repeated; the limit is {max_drawn_tokens} "
        message += "(--max-heatmap-tokens)"
        raise refuse("too_long", f"{message}: draw fewer responses at once, or ask for format json")


def _of_item(error: RequestError, index: int) -> list[Fault]:
    return [Fault(fault.code, fault.message, fault.param, index) for fault in error.faults]


def _quantities(request: ScoreRequest) -> set[str]:
    """What the engine must be able to compute besides the two log-probs."""
    asked = {request.signal, *(request.include or ())} & {"kl", "centred", "entropy"}
    if request.top_k:
        asked.add("alternatives")
    if any(item.candidate_ids is not None for item in request.listed()):
        asked.add("candidate_reward")
    return asked
