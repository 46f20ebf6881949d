"""A cache of scores in which equal requests in flight share one computation. Knows no device.

Bounded in bytes; the least recently used entry is evicted first. Keys contain the revision of the pair, so a pair that
is replaced never gets scores of the old one.
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
ENTRY_BYTES = 400  # estimated overhead of a trunk's entry, and of a branch's scores in addition to its arrays


@dataclass(frozen=True, slots=True)
class Scope:
    """Scores are shared only within a scope: one revision of a pair, and one group of callers (None is a group too)."""

    revision: str
    group: str | None


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A trunk whose scores are being computed. `keys`: all trunks that the same request computes."""

    keys: frozenset[Key]
    bulk: bool
    scores: "asyncio.Future[list[TokenScores]]"


class ScoreCache:
    """For one event loop. With `max_bytes` 0 nothing is cached, but computations in flight are still shared."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._kept: OrderedDict[Key, tuple[list[TokenScores], int]] = OrderedDict()
        self._kept_bytes = 0
        self._in_flight: dict[Key, _InFlight] = {}

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    async def get_or_compute(
        self, keys: Sequence[Key], trunks: Trunks, compute: Callable[[Trunks], Awaitable[Scores]], *, bulk: bool = False
    ) -> Scores:
        """The scores of trunks: cached ones, ones in flight, and the rest from `compute`. Raises its errors.

        Joins an in-flight computation only if that request needs only a subset of our trunks and is not bulk (unless we
        are), so that joining never delays us. If it fails or is cancelled, we compute the scores ourselves.
        """
        found: dict[Key, list[TokenScores]] = {}
        asked = frozenset(keys)
        subsets: dict[frozenset[Key], bool] = {}
        while missing := {key: trunk for key, trunk in zip(keys, trunks, strict=True) if key not in found}:
            found |= {key: scores for key in missing if (scores := self._kept_scores(key, missing[key])) is not None}
            joined = {
                key: other
                for key in missing
                if key not in found and (other := self._joinable(key, asked, subsets, bulk))
            }
            own = {key: trunk for key, trunk in missing.items() if key not in found and key not in joined}
            # Our own trunks are computed first, so that requests that joined us do not wait until the ones that we
            # joined end.
            if own:
                found |= await self._compute(own, compute, bulk)
            for key, other in joined.items():
                # Not `await other`: it would raise if the other is cancelled, and cancel the other if we are.
                if not other.done():
                    await asyncio.wait({other})
                if not other.cancelled():
                    self._metrics.reused("in_flight", missing[key].tokens)
                    found[key] = other.result()
        return [found[key] for key in keys]

    def _kept_scores(self, key: Key, trunk: Trunk) -> list[TokenScores] | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        self._metrics.reused("kept", trunk.tokens)
        return self._kept[key][0]

    def _joinable(
        self, key: Key, asked: frozenset[Key], subsets: dict[frozenset[Key], bool], bulk: bool
    ) -> "asyncio.Future[list[TokenScores]] | None":
        """`subsets`: which requests in flight need only what is asked for, compared once for all of their trunks."""
        other = self._in_flight.get(key)
        if other is None or (other.bulk and not bulk):
            return None
        if other.keys not in subsets:
            subsets[other.keys] = other.keys <= asked
        return other.scores if subsets[other.keys] else None

    async def _compute(
        self, own: dict[Key, Trunk], compute: Callable[[Trunks], Awaitable[Scores]], bulk: bool
    ) -> dict[Key, list[TokenScores]]:
        """Compute trunks; other requests can join meanwhile. If it fails, these compute their scores themselves."""
        loop = asyncio.get_running_loop()
        # If a key is in flight but could not be joined, later requests join its first computation.
        new = [key for key in own if key not in self._in_flight]
        computed = frozenset(own)  # one for all: a request can have thousands of trunks
        started = {key: _InFlight(computed, bulk, loop.create_future()) for key in new}
        self._in_flight |= started
        try:
            found = dict(zip(own, await compute(list(own.values())), strict=True))
            for key, scores in found.items():
                if key in started:
                    started[key].scores.set_result(scores)
                self._keep(key, scores)
            return found
        finally:
            for key, entry in started.items():
                entry.scores.cancel()  # wakes the requests that joined; does nothing to a future that has its result
                del self._in_flight[key]

    def _keep(self, key: Key, scores: list[TokenScores]) -> None:
        size = ENTRY_BYTES + sum(ENTRY_BYTES + _bytes_of(branch) for branch in scores)
        if size > self._max_bytes:
            return
        self._kept_bytes += size - (self._kept[key][1] if key in self._kept else 0)
        self._kept[key] = [_copied(branch) for branch in scores], size
        while self._kept_bytes > self._max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self._kept_bytes -= freed


def keys_of(trunks: Trunks, wants: Wants, scope: Scope) -> list[Key]:
    """A key for each trunk; equal keys mean equal scores. Hashes every token, so it blocks for large requests."""
    return [_key(trunk, repr((astuple(wants), astuple(scope)))) for trunk in trunks]


def _key(trunk: Trunk, context: str) -> Key:
    digest = hashlib.blake2b(context.encode(), digest_size=32)
    for branch in (None, *trunk.branches):
        arrays = [trunk.prompt_P] if branch is None else [branch.ids_T, branch.scored_T, branch.candidates_SK]
        for array in arrays:
            # The shapes are hashed too: arrays of different lengths can give the same bytes in sequence.
            digest.update(repr(None if array is None else array.shape).encode())
            if array is not None:
                digest.update(array.tobytes())
    return digest.digest()


def _copied(scores: TokenScores) -> TokenScores:
    """Copies of the arrays: an engine returns views of its batch's arrays, and keeping one would keep all of them."""
    arrays = {name: getattr(scores, name) for name in TokenScores.__slots__}
    return replace(scores, **{name: array.copy() for name, array in arrays.items() if array is not None})


def _bytes_of(scores: TokenScores) -> int:
    arrays = (getattr(scores, name) for name in TokenScores.__slots__)
    return sum(array.nbytes for array in arrays if array is not None)
