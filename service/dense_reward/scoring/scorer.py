"""The whole flow of a request: check, encode, compute or reuse scores, build the rows. Knows no HTTP and no device."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dense_reward.batching.admission import Permit
from dense_reward.batching.batcher import Batcher, Computed, cost_tokens
from dense_reward.batching.scheduler import Terms
from dense_reward.batching.worker_threads import Lanes
from dense_reward.cancellation import check_cancelled
from dense_reward.errors import Fault, RequestError, refuse
from dense_reward.records import Engine, FloatArray, Scores, TaughtBy, TokenScores, Trunk
from dense_reward.reward import reward
from dense_reward.schemas import ModelCard, ScoreRequest
from dense_reward.scoring.items import Limits, PreparedItem, prepare, rendered_messages
from dense_reward.scoring.rows import Row, RowBuilder, wants
from dense_reward.scoring.score_cache import Scope, ScoreCache, keys_of
from dense_reward.telemetry.metrics import Metrics
from dense_reward.telemetry.running_stats import RunningStats
from dense_reward.text.encode import Encoder

MAX_ALTERNATIVES = 262_144
"""Limit on scored tokens times top_k of one request: each alternative is an object of the answer, freed in one step."""
FROM_DISTRIBUTIONS = {"sft_logprob", "reference_logprob", "kl", "centred", "entropy", "varentropy"}
"""Arrays of an answer that need the distribution of a model, not only a reward."""
ITEM_TOKENS, RENDERINGS_PER_TOKEN = 16, 4
"""What an item costs beside its tokens, and how often a chat is rendered at the cost of its tokens."""
SMALL_REQUEST_TOKENS = 20_000
"""Requests up to this size are hashed on the event loop; larger ones on a thread, because hashing blocks."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request: its rows, and the faults of its items if on_error is per_item."""

    rows: list[Row]
    faults: list[Fault]
    prompt_tokens: int
    response_tokens: int
    scored_tokens: int
    timing_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Scorer:
    """Answers the requests for one served pair. `taught_by` gives the engine of a teacher, if the pair can be one."""

    card: ModelCard
    encoder: Encoder
    engine: Engine
    batcher: Batcher
    limits: Limits
    max_items: int
    score_cache: ScoreCache
    metrics: Metrics
    lanes: Lanes
    taught_by: TaughtBy | None = None

    async def score(
        self,
        request: ScoreRequest,
        permit: Permit,
        *,
        group: str | None = None,
        max_drawn_tokens: int | None = None,
    ) -> Answer:
        """Answer a request. Raises RequestError with every bad item, unless on_error is per_item.

        Work is shared only with requests of the same `group`; None is a group too.

        `max_drawn_tokens` is set if the answer will be drawn as a heatmap: an answer with more tokens is refused as
        too_long. A prompt counts once for each of its responses.
        """
        self._check(request)
        clock = time.perf_counter
        started_at = clock()
        prepared, faults = await self.lanes.of(_encoding_tokens(request, permit.tokens)).run(self._prepare, request)
        if faults and request.on_error == "fail":
            raise RequestError(faults)
        _check_answer(request, prepared.values(), max_drawn_tokens)
        trunks = [item.trunk for item in prepared.values()]
        permit.correct(cost_tokens(self.engine, trunks))
        encoded_at = clock()
        computed = await self._scores(request, trunks, group)
        computed_at = clock()
        lane = self.lanes.of(permit.tokens * (1 + request.top_k))
        rows, broken, rewards = await lane.run(self._rows, request, prepared, computed.scores)
        self.metrics.scored(self.card.name, rewards)
        self.metrics.non_finite(self.card.name, len(broken))
        if broken and request.on_error == "fail":
            raise RequestError(broken)
        timing_s = {
            "encode_s": encoded_at - started_at,
            "queue_s": computed.queue_s,
            "compute_s": computed.compute_s,
            "describe_s": clock() - computed_at,
            "total_s": clock() - started_at,
        }
        return self._answer(rows, faults + broken, list(prepared.values()), timing_s)

    async def _scores(self, request: ScoreRequest, trunks: Sequence[Trunk], group: str | None) -> Computed:
        """The scores from the cache or the batcher, and the times of the part that was computed for this request."""
        wanted, terms = wants(request), Terms(request.priority == "bulk", group)
        last = Computed([], 0.0, 0.0)

        async def compute(new: Sequence[Trunk]) -> Scores:
            nonlocal last
            last = await self.batcher.submit(self.engine, new, wanted, terms)
            return last.scores

        scope = Scope(self.card.revision, group)
        tokens = sum(trunk.tokens + ITEM_TOKENS for trunk in trunks)
        if tokens <= SMALL_REQUEST_TOKENS:
            keys = keys_of(trunks, wanted, scope)
        else:
            keys = await self.lanes.of(tokens).run(keys_of, trunks, wanted, scope)
        before = time.perf_counter()
        scores = await self.score_cache.get_or_compute(keys, trunks, compute, bulk=terms.bulk)
        if not last.scores:  # all scores were cached or in flight, so the whole time was spent waiting
            return Computed(scores, time.perf_counter() - before, 0.0)
        return replace(last, scores=scores)

    def _check(self, request: ScoreRequest) -> None:
        card = self.card
        if request.tokenizer_sha256 not in (None, card.tokenizer_sha256):
            message = f"this pair has tokenizer {card.tokenizer_sha256}: your ids stand for other tokens here"
            raise refuse("tokenizer_mismatch", message, param="tokenizer_sha256")
        if request.expect_revision not in (None, card.revision):
            message = f"revision {card.revision} is served, not {request.expect_revision}: the checkpoints were changed"
            raise refuse("revision_mismatch", message, param="expect_revision")
        if request.items is not None and len(request.items) > self.max_items:
            message = f"{len(request.items)} items; the limit is {self.max_items} (--max-items): send them in parts"
            raise refuse("too_long", message, param="items")
        missing = _quantities(request) - set(card.offered)
        if missing:
            named = ", ".join(sorted(missing))
            message = f"this engine cannot compute {named}: omit them"
            if card.token_head is not None:
                message = (
                    f"{card.name} is a token head, which has one value for each token and no distribution, so it has "
                    f"no {named}: omit them, or request them of a pair"
                )
            raise refuse("unsupported_by_engine", message)
        if request.top_k > card.vocabulary:
            message = f"top_k {request.top_k} is larger than the vocabulary of {card.vocabulary} tokens"
            raise refuse("invalid_request", message, param="top_k")

    def _prepare(self, request: ScoreRequest) -> tuple[dict[int, PreparedItem], list[Fault]]:
        """The valid items by index, and the faults of the others."""
        prepared: dict[int, PreparedItem] = {}
        faults: list[Fault] = []
        for index, item in enumerate(request.listed()):
            check_cancelled()
            try:
                prepared[index] = prepare(item, request, self.encoder, self.limits)
            except RequestError as error:
                faults.extend(_of_item(error, index))
        return prepared, faults

    def _rows(
        self, request: ScoreRequest, prepared: dict[int, PreparedItem], scores: Sequence[Sequence[TokenScores]]
    ) -> tuple[list[Row], list[Fault], RunningStats]:
        """The rows of the items whose scores are finite, the faults of the others, and statistics of the rewards."""
        builder = RowBuilder(request, self.encoder.tokenizer)
        rows: list[Row] = []
        faults: list[Fault] = []
        rewards: list[FloatArray] = []
        for (index, item), item_scores in zip(prepared.items(), scores, strict=True):
            check_cancelled()
            try:
                rows.extend(builder.rows(index, item, item_scores))
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


def _encoding_tokens(request: ScoreRequest, body_tokens: int) -> int:
    """About how many tokens of text cost as much to encode as this request, of which only the body's size is known."""
    items = request.listed()
    renderings = max((rendered_messages(item) / len(item.messages or (1,)) for item in items), default=1.0)
    return max(int(body_tokens * max(1.0, renderings / RENDERINGS_PER_TOKEN)), len(items) * ITEM_TOKENS)


def _check_answer(request: ScoreRequest, items: Collection[PreparedItem], max_drawn_tokens: int | None) -> None:
    """Raises RequestError(too_long) if the answer would be too large to send, or to draw."""
    tokens = sum(int(response.scored_T.sum()) for item in items for response in item.responses)
    if tokens * request.top_k > MAX_ALTERNATIVES:
        message = f"top_k {request.top_k} of {tokens} scored tokens; the limit is {MAX_ALTERNATIVES} alternatives"
        raise refuse("too_long", f"{message}: lower top_k, or send the items in parts", param="top_k")
    drawn = tokens + sum(len(item.trunk.prompt_P) * len(item.responses) for item in items)
    if max_drawn_tokens is not None and drawn > max_drawn_tokens:
        message = f"a heatmap of {drawn} tokens, prompts repeated; the limit is {max_drawn_tokens} "
        message += "(--max-heatmap-tokens)"
        raise refuse("too_long", f"{message}: draw fewer responses in one request, or set format to json")


def _of_item(error: RequestError, index: int) -> list[Fault]:
    return [Fault(fault.code, fault.message, fault.param, index) for fault in error.faults]


def _quantities(request: ScoreRequest) -> set[str]:
    """What the engine must be able to compute in addition to the reward."""
    quantities = {request.signal, *(request.include or ())} & FROM_DISTRIBUTIONS
    if request.top_k:
        quantities.add("alternatives")
    if any(item.candidate_ids is not None for item in request.listed()):
        quantities.add("candidate_reward")
    return quantities
