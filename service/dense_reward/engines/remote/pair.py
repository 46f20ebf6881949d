"""A pair whose log-probs another inference engine computes, with one query for each sequence.

A model is anything that answers queries: vLLM in this process, or servers. Shapes: L ids of a sequence, T positions
from `start` on, K ids that are scored at each of them.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dense_reward.engines.remote.event_loop import BackgroundLoop
from dense_reward.records import (
    Branch,
    Cost,
    EngineInfo,
    FloatArray,
    IdArray,
    Result,
    Scores,
    TokenScores,
    Trunk,
    Wants,
    Work,
    no_scores,
)


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A sequence, and the ids to score at each position from `start` on: [T, K], the sequence's own ids first.

    `start` is at least `prompt_tokens`, which is at least 1. The sequence ends with the last wanted position.
    """

    ids_L: IdArray
    prompt_tokens: int
    start: int
    wanted_TK: IdArray


class RemoteModel(Protocol):
    """One checkpoint in another inference engine."""

    @property
    def unavailable_reason(self) -> str | None:
        """Why it cannot answer now, although it may recover; None if it can."""
        ...

    async def logprobs(self, query: Query) -> FloatArray:
        """[T, K], in nats.

        Raises SequenceError if only this query fails, RequestError(engine_unavailable) while all fail, EngineLostError
        if all will fail until this process ends.
        """
        ...

    async def close(self) -> None: ...


class RemotePair:
    """The engine of such a pair. Sends all queries of a batch concurrently."""

    def __init__(self, sft: RemoteModel, reference: RemoteModel, info: EngineInfo, loop: BackgroundLoop) -> None:
        self._models = sft, reference
        self._info = info
        self._loop = loop

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def unavailable_reason(self) -> str | None:
        return next((model.unavailable_reason for model in self._models if model.unavailable_reason is not None), None)

    def cost(self, trunk: Trunk) -> Cost:
        """Each branch costs a whole sequence, because engines do not report what their prefix caches save."""
        prompt_tokens = len(trunk.prompt_P)
        return Cost(
            0,
            tuple(prompt_tokens + len(branch.ids_T) if branch.scored_T.any() else 0 for branch in trunk.branches),
        )

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        # requests for quantities outside `info.quantities` are refused earlier, so `wants` asks for none here
        queries = [[query_of(trunk, branch) for branch in trunk.branches] for trunk in trunks]
        return lambda: self._loop.run(self._scores(trunks, queries, wants))

    def close(self) -> None:
        close_models(self._models, self._loop)

    async def _scores(self, trunks: Sequence[Trunk], queries: Sequence[Sequence[Query | None]], wants: Wants) -> Scores:
        sent = [query for trunk_queries in queries for query in trunk_queries if query is not None]
        logprobs = await gather_or_cancel([model.logprobs(query) for model in self._models for query in sent])
        pairs = zip(logprobs[: len(sent)], logprobs[len(sent) :], strict=True)
        return [
            [
                no_scores(branch, wants) if query is None else _token_scores(branch, *next(pairs))
                for branch, query in zip(trunk.branches, trunk_queries, strict=True)
            ]
            for trunk, trunk_queries in zip(trunks, queries, strict=True)
        ]


def close_models(models: Sequence[RemoteModel], loop: BackgroundLoop) -> None:
    """Close the models, then the loop that they run on."""
    for model in models:
        loop.run(model.close())
    loop.close()


async def gather_or_cancel(work: Sequence[Coroutine[object, object, Result]]) -> list[Result]:
    """All results, in order. If one fails, cancels the others (asyncio.gather does not) and raises its exception."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def query_of(trunk: Trunk, branch: Branch) -> Query | None:
    """The query for a branch, from its first scored token to its last; None if no token is scored."""
    scored = np.flatnonzero(branch.scored_T)
    if not len(scored):
        return None
    first, end = int(scored[0]), int(scored[-1]) + 1
    own_T1 = branch.ids_T[first:end, None]
    wanted_TK = own_T1
    if branch.candidates_SK is not None:
        candidates_TK = np.repeat(own_T1, branch.candidates_SK.shape[1], axis=1)  # fills unscored positions
        candidates_TK[scored - first] = branch.candidates_SK
        wanted_TK = np.concatenate([own_T1, candidates_TK], axis=1)
    prompt_tokens = len(trunk.prompt_P)
    return Query(np.concatenate([trunk.prompt_P, branch.ids_T[:end]]), prompt_tokens, prompt_tokens + first, wanted_TK)


def _token_scores(branch: Branch, sft_TK: FloatArray, reference_TK: FloatArray) -> TokenScores:
    scored = np.flatnonzero(branch.scored_T)
    sft_SK, reference_SK = (values_TK[scored - scored[0]] for values_TK in (sft_TK, reference_TK))
    if branch.candidates_SK is None or not branch.candidates_SK.shape[1]:
        return TokenScores(sft_SK[:, 0], reference_SK[:, 0])
    return TokenScores(
        sft_SK[:, 0],
        reference_SK[:, 0],
        candidate_sft_logprob_SK=sft_SK[:, 1:],
        candidate_reference_logprob_SK=reference_SK[:, 1:],
    )
