"""Scores that are known already, or are being computed for somebody else: nothing is computed twice. Knows no device.

Bounded in bytes; what was asked for least recently goes first. Kept by revision: a pair that changes is another.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import astuple, dataclass, replace

from dense_reward.records import Scores, TokenScores, Trunk, Wants
from dense_reward.telemetry.metrics import Metrics

Key = bytes
Trunks = Sequence[Trunk]
ENTRY_BYTES = 400  # of a branch's scores beside its arrays, and of a trunk's entry


@dataclass(frozen=True, slots=True)
class Scope:
    """Among what scores are the same: one revision of a pair, and the callers who may share."""

    revision: str
    group: str | None


@dataclass(frozen=True, slots=True)
class _Flight:
    """Scores that are being computed, and what else its request asks for."""

    keys: frozenset[Key]
    bulk: bool
    scores: "asyncio.Future[list[TokenScores]]"


class ScoreCache:
    """Of one event loop. With `max_bytes` 0 nothing is kept; what is in flight is shared all the same."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._kept: OrderedDict[Key, tuple[list[TokenScores], int]] = OrderedDict()
        self._kept_bytes = 0
        self._flying: dict[Key, _Flight] = {}

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    async def of(
        self, keys: Sequence[Key], trunks: Trunks, compute: Callable[[Trunks], Awaitable[Scores]], *, bulk: bool = False
    ) -> Scores:
        """Scores of trunks: kept ones, those that others wait for, and the rest by `compute`, whose errors it raises.

        Others are waited for where they ask for nothing else and are not bulk, unless this is: nobody waits longer than
        he would alone. Where they fail or leave, it is computed anew.
        """
        found: dict[Key, list[TokenScores]] = {}
        while missing := {key: trunk for key, trunk in zip(keys, trunks, strict=True) if key not in found}:
            found |= {key: scores for key in missing if (scores := self._kept_scores(key, missing[key])) is not None}
            flights = {key: flight for key in missing if key not in found and (flight := self._joined(key, keys, bulk))}
            own = {key: trunk for key, trunk in missing.items() if key not in found and key not in flights}
            if own:
                found |= await self._computed(own, compute, bulk)
            for key, flight in flights.items():
                await asyncio.wait({flight})
                if not flight.cancelled():
                    self._metrics.reused("in_flight", missing[key].tokens)
                    found[key] = flight.result()
        return [found[key] for key in keys]

    def _kept_scores(self, key: Key, trunk: Trunk) -> list[TokenScores] | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        self._metrics.reused("kept", trunk.tokens)
        return self._kept[key][0]

    def _joined(self, key: Key, keys: Sequence[Key], bulk: bool) -> "asyncio.Future[list[TokenScores]] | None":
        flight = self._flying.get(key)
        if flight is None or not flight.keys <= set(keys) or (flight.bulk and not bulk):
            return None
        return flight.scores

    async def _computed(
        self, own: dict[Key, Trunk], compute: Callable[[Trunks], Awaitable[Scores]], bulk: bool
    ) -> dict[Key, list[TokenScores]]:
        """Others who ask for the same meanwhile wait for this; unless it comes to nothing, when they are let go."""
        loop = asyncio.get_running_loop()
        new = [key for key in own if key not in self._flying]
        flights = {key: _Flight(frozenset(own), bulk, loop.create_future()) for key in new}
        self._flying |= flights
        try:
            found = dict(zip(own, await compute(list(own.values())), strict=True))
            for key, scores in found.items():
                if key in flights:
                    flights[key].scores.set_result(scores)
                self._keep(key, scores)
            return found
        finally:
            for key, flight in flights.items():
                flight.scores.cancel()
                del self._flying[key]

    def _keep(self, key: Key, scores: list[TokenScores]) -> None:
        size = ENTRY_BYTES + sum(ENTRY_BYTES + _bytes_of(branch) for branch in scores)
        if size > self._max_bytes:
            return
        self._kept_bytes += size - (self._kept[key][1] if key in self._kept else 0)
        self._kept[key] = [_apart(branch) for branch in scores], size
        while self._kept_bytes > self._max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self._kept_bytes -= freed


def keys_of(trunks: Trunks, wants: Wants, scope: Scope) -> list[Key]:
    """A key for each trunk: equal only where every number of the scores is. Takes a while for many tokens."""
    return [_key(trunk, repr((astuple(wants), astuple(scope)))) for trunk in trunks]


def _key(trunk: Trunk, asked: str) -> Key:
    digest = hashlib.blake2b(asked.encode(), digest_size=32)
    for branch in (None, *trunk.branches):
        arrays = [trunk.prompt_P] if branch is None else [branch.ids_T, branch.scored_T, branch.candidates_SK]
        for array in arrays:
            digest.update(repr(None if array is None else array.shape).encode())
            if array is not None:
                digest.update(array.tobytes())
    return digest.digest()


def _apart(scores: TokenScores) -> TokenScores:
    """Arrays of their own: those of an answer are parts of their whole batch's, and would keep all of it."""
    arrays = {name: getattr(scores, name) for name in TokenScores.__slots__}
    return replace(scores, **{name: array.copy() for name, array in arrays.items() if array is not None})


def _bytes_of(scores: TokenScores) -> int:
    arrays = (getattr(scores, name) for name in TokenScores.__slots__)
    return sum(array.nbytes for array in arrays if array is not None)
