"""What a batch asks of several pairs -> work that computes nothing twice. Knows engines by their protocol alone."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from dense_reward.records import Branch, Engine, Scores, SharingEngine, TokenScores, Trunk, Wants, Work


@dataclass(frozen=True, slots=True)
class Ask:
    """A trunk, and the pair that is to score it; work is shared within a group alone."""

    engine: Engine
    trunk: Trunk
    group: str | None = None


@dataclass(slots=True)
class _Asked:
    """One trunk, whoever asks for it: the places of its asks, by engine."""

    trunk: Trunk
    group: str | None
    places: dict[Engine, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class _Cell:
    """Trunks of one group that the same engines score."""

    engines: tuple[Engine, ...]
    asked: list[_Asked] = field(default_factory=list)

    def prepare(self, wants: Wants) -> Callable[[], list[Scores]]:
        """Gives the scores of each engine."""
        trunks = [asked.trunk for asked in self.asked]
        first = self.engines[0]
        if len(self.engines) > 1 and isinstance(first, SharingEngine):
            return first.prepare_shared(self.engines, trunks, wants)
        work = first.prepare(trunks, wants)
        return lambda: [work()]


def prepare_together(asks: Sequence[Ask], wants: Wants) -> Work:
    """Scores, one list per ask. Equal trunks are computed once; where engines share a model, it computes them once."""
    cells = _cells(asks)
    works = [cell.prepare(wants) for cell in cells]

    def work() -> Scores:
        scores: list[list[TokenScores]] = [[] for _ in asks]
        for cell, cell_work in zip(cells, works, strict=True):
            for engine, found in zip(cell.engines, cell_work(), strict=True):
                _check_count(len(cell.asked), len(found))
                for asked, branches in zip(cell.asked, found, strict=True):
                    for place in asked.places[engine]:
                        scores[place] = branches
        return scores

    return work


def _check_count(expected: int, found: int) -> None:
    if expected != found:
        raise RuntimeError(f"the engine answered {found} trunks of {expected}")


def _cells(asks: Sequence[Ask]) -> list[_Cell]:
    trunks: dict[Hashable, _Asked] = {}
    for place, ask in enumerate(asks):
        asked = trunks.setdefault((ask.group, _content(ask.trunk)), _Asked(ask.trunk, ask.group))
        asked.places.setdefault(ask.engine, []).append(place)
    cells: dict[Hashable, _Cell] = {}
    order = list(dict.fromkeys(ask.engine for ask in asks))
    for asked in trunks.values():
        for engines in _families([engine for engine in order if engine in asked.places]):
            cells.setdefault((asked.group, engines), _Cell(engines)).asked.append(asked)
    return list(cells.values())


def _families(engines: Sequence[Engine]) -> list[tuple[Engine, ...]]:
    """Engines that can compute together, each in one family."""
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
    named = None if candidates is None else (candidates.shape, candidates.tobytes())
    return branch.ids_T.tobytes(), branch.scored_T.tobytes(), named
