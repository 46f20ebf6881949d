"""Deduplicates a batch: equal trunks are computed once, and pairs that share a model run it once.

Sees engines only through the protocol. The invariants:

- Requests of different groups never share work, so that response times reveal nothing about another group's requests.
- Two trunks are equal only if every array that a score depends on is equal: prompt, ids, mask and candidates. All tasks
  of a batch get the same `wants`; the batcher then removes what a request did not want.
- Tasks with equal trunks and the same engine share their score objects, so nothing may change these.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from dense_reward.records import (
    Branch,
    Engine,
    Scores,
    SharingEngine,
    StagedWork,
    TokenScores,
    Trunk,
    Wants,
    launched,
)


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """A trunk, and the pair that scores it. Work is shared only within a `group`."""

    engine: Engine
    trunk: Trunk
    group: str | None = None


@dataclass(slots=True)
class _UniqueTrunk:
    """A trunk of a group, and for each engine that scores it the indices of its tasks."""

    trunk: Trunk
    group: str | None
    tasks: dict[Engine, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class _SubBatch:
    """Trunks of one group that the same engines score in one call on the device."""

    engines: tuple[Engine, ...]
    unique: list[_UniqueTrunk] = field(default_factory=list)

    def prepare(self, wants: Wants) -> StagedWork[list[Scores]]:
        """Prepare work that returns the scores of each engine."""
        trunks = [unique.trunk for unique in self.unique]
        first = self.engines[0]
        if len(self.engines) > 1 and isinstance(first, SharingEngine):
            return first.prepare_shared(self.engines, trunks, wants)
        work = first.prepare(trunks, wants)

        def launch() -> Callable[[], list[Scores]]:
            collect = launched(work)
            return lambda: [collect()]

        return StagedWork(launch, work.tokens if isinstance(work, StagedWork) else None)


def prepare_batch(tasks: Sequence[ScoringTask], wants: Wants) -> StagedWork[Scores]:
    """Prepare work that returns one list of scores per task, in order. Raises what the engines' `prepare` raises.

    The work raises what the engines' work raises, and RuntimeError if an engine returns scores for a different number
    of trunks.
    """
    sub_batches = _sub_batches(tasks)
    works = [sub_batch.prepare(wants) for sub_batch in sub_batches]
    counts = [work.tokens for work in works if work.tokens is not None]

    def launch() -> Callable[[], Scores]:
        collects = [work.launch() for work in works]

        def collect() -> Scores:
            scores: list[list[TokenScores]] = [[] for _ in tasks]
            for sub_batch, collect_one in zip(sub_batches, collects, strict=True):
                for engine, found in zip(sub_batch.engines, collect_one(), strict=True):
                    _check_count(len(sub_batch.unique), len(found))
                    for unique, branches in zip(sub_batch.unique, found, strict=True):
                        for index in unique.tasks[engine]:
                            scores[index] = branches
            return scores

        return collect

    return StagedWork(launch, sum(counts) if len(counts) == len(works) else None)


def _check_count(expected: int, found: int) -> None:
    if expected != found:
        raise RuntimeError(f"the engine returned scores of {found} trunks instead of {expected}")


def _sub_batches(tasks: Sequence[ScoringTask]) -> list[_SubBatch]:
    trunks: dict[Hashable, _UniqueTrunk] = {}
    for index, task in enumerate(tasks):
        unique = trunks.setdefault((task.group, _content(task.trunk)), _UniqueTrunk(task.trunk, task.group))
        unique.tasks.setdefault(task.engine, []).append(index)
    sub_batches: dict[Hashable, _SubBatch] = {}
    # All trunks list their engines in one order: the same set in two orders would become two sub-batches.
    order = list(dict.fromkeys(task.engine for task in tasks))
    for unique in trunks.values():
        for engines in _families([engine for engine in order if engine in unique.tasks]):
            sub_batches.setdefault((unique.group, engines), _SubBatch(engines)).unique.append(unique)
    return list(sub_batches.values())


def _families(engines: Sequence[Engine]) -> list[tuple[Engine, ...]]:
    """Partition engines into families that can compute a batch in one call because they share a model."""
    families: list[list[Engine]] = []
    for engine in engines:
        for family in families:
            if isinstance(engine, SharingEngine) and engine.shares_with(family[0]):
                family.append(engine)
                break
        else:
            families.append([engine])
    return [tuple(family) for family in families]


def _content(trunk: Trunk) -> Hashable:
    return trunk.prompt_P.tobytes(), tuple(map(_branch_content, trunk.branches))


def _branch_content(branch: Branch) -> Hashable:
    candidates = branch.candidates_SK
    candidate_key = None if candidates is None else (candidates.shape, candidates.tobytes())
    return branch.ids_T.tobytes(), branch.scored_T.tobytes(), candidate_key
