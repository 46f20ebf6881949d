"""A pair whose models are computed elsewhere, one query a sequence: by vLLM in this process, or by servers.

Knows neither: a model is whatever answers queries. Shapes: L ids of a sequence, T of them from `start` on, K ids named
at each of these.
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
    """A sequence, and the ids whose log-probs are wanted from position `start` on: [T, K], its own ids first.

    `start` is at least `prompt_tokens`, which is at least 1. Nothing comes after the last position that is wanted.
    """

    ids_L: IdArray
    prompt_tokens: int
    start: int
    wanted_TK: IdArray


class RemoteModel(Protocol):
    """One checkpoint, computed elsewhere."""

    @property
    def unavailable_reason(self) -> str | None:
        """Why it answers nothing now, though it may again."""
        ...

    async def logprobs(self, query: Query) -> FloatArray:
        """[T, K], in nats.

        Raises SequenceError where this query is not answered, RequestError(engine_unavailable) while none is,
        EngineLostError where none will be.
        """
        ...

    async def close(self) -> None: ...


class RemotePair:
    """Two of them; all queries of a batch are sent at once."""

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
        """Every branch is a sequence of its own: what an engine remembers of equal prompts it does not tell."""
        prompt_tokens = len(trunk.prompt_P)
        return Cost(
            0,
            tuple(prompt_tokens + len(branch.ids_T) if branch.scored_T.any() else 0 for branch in trunk.branches),
        )

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        # a quantity that is not in `info.quantities` is refused before: `wants` holds none
        queries = [[query_of(trunk, branch) for branch in trunk.branches] for trunk in trunks]
        return lambda: self._loop.run(self._scores(trunks, queries, wants))

    def close(self) -> None:
        close(self._models, self._loop)

    async def _scores(self, trunks: Sequence[Trunk], queries: Sequence[Sequence[Query | None]], wants: Wants) -> Scores:
        asked = [query for of_trunk in queries for query in of_trunk if query is not None]
        answers = await together([model.logprobs(query) for model in self._models for query in asked])
        pairs = zip(answers[: len(asked)], answers[len(asked) :], strict=True)
        return [
            [
                no_scores(branch, wants) if query is None else _scores_of(branch, *next(pairs))
                for branch, query in zip(trunk.branches, of_trunk, strict=True)
            ]
            for trunk, of_trunk in zip(trunks, queries, strict=True)
        ]


def close(models: Sequence[RemoteModel], loop: BackgroundLoop) -> None:
    """The models first, then the loop that they were asked on."""
    for model in models:
        loop.run(model.close())
    loop.close()


async def together(work: Sequence[Coroutine[object, object, Result]]) -> list[Result]:
    """All results, in order. Raises what the first failing one raises, the others cancelled."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def query_of(trunk: Trunk, branch: Branch) -> Query | None:
    """What is to be asked for a branch, from its first scored token to the last; None where none is scored."""
    scored = np.flatnonzero(branch.scored_T)
    if not len(scored):
        return None
    first, end = int(scored[0]), int(scored[-1]) + 1
    own_T1 = branch.ids_T[first:end, None]
    wanted_TK = own_T1
    if branch.candidates_SK is not None:
        candidates_TK = np.repeat(own_T1, branch.candidates_SK.shape[1], axis=1)  # stands where nothing is scored
        candidates_TK[scored - first] = branch.candidates_SK
        wanted_TK = np.concatenate([own_T1, candidates_TK], axis=1)
    prompt_tokens = len(trunk.prompt_P)
    return Query(np.concatenate([trunk.prompt_P, branch.ids_T[:end]]), prompt_tokens, prompt_tokens + first, wanted_TK)


def _scores_of(branch: Branch, sft_TK: FloatArray, reference_TK: FloatArray) -> TokenScores:
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
