"""Chooses the value of each policy's grid: the best mean over tuning seeds, which are not reported. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from dense_reward_trainer.studies.regimes.config import Metric
from dense_reward_trainer.studies.regimes.figures import CellFigures
from dense_reward_trainer.studies.regimes.policies import AnyPolicy, SftPolicy, with_value


@dataclass(frozen=True, slots=True)
class Choice:
    """The values that were tried for one policy, the mean of the metric with each, and the one that was chosen.

    `on_edge`: the chosen value is the first or the last of three or more, so that a better one may lie beyond.
    """

    key: str
    values: tuple[JsonValue, ...]
    means: tuple[float, ...]
    chosen: JsonValue
    on_edge: bool


def variants(policies: Mapping[str, AnyPolicy]) -> dict[str, AnyPolicy]:
    """What the tuning seeds run: each policy that has a grid, with each of its values.

    A policy whose FLOPs are matched to those of another takes that of the other's first value: FLOPs do not depend on
    it. Policies without a grid are left out, but for those to which FLOPs are matched.
    """
    found: dict[str, AnyPolicy] = {}
    for name, policy in policies.items():
        for key, values in policy.grid.items():
            for index, value in enumerate(values):
                found[variant_name(name, index)] = _matched(with_value(policy, key, value), policies)
    for policy in list(found.values()):
        if isinstance(policy, SftPolicy) and (other := policy.matched_flops) in policies:
            found[str(other)] = policies[str(other)]
    return found


def variant_name(name: str, index: int) -> str:
    return f"{name}--{index}"


def choose(policies: Mapping[str, AnyPolicy], cells: Sequence[CellFigures], metric: Metric) -> dict[str, Choice]:
    """The best value of each grid; of equal ones the first."""
    chosen: dict[str, Choice] = {}
    for name, policy in policies.items():
        for key, values in policy.grid.items():
            means = tuple(
                sum(cell.policies[variant_name(name, index)].accuracy(metric) for cell in cells) / len(cells)
                for index in range(len(values))
            )
            best = means.index(max(means))
            chosen[name] = Choice(key, values, means, values[best], len(values) > 2 and best in {0, len(values) - 1})
    return chosen


def tuned(policies: Mapping[str, AnyPolicy], choices: Mapping[str, Choice]) -> dict[str, AnyPolicy]:
    """The policies with the chosen values, without grids."""
    return {
        name: with_value(policy, choices[name].key, choices[name].chosen) if name in choices else policy
        for name, policy in policies.items()
    }


def choice_lines(choices: Mapping[str, Choice]) -> list[str]:
    """One line for each grid: what was tried, and what came out."""
    lines = []
    for name, one in choices.items():
        tried = ", ".join(f"{value}: {mean:.3f}" for value, mean in zip(one.values, one.means, strict=True))
        edge = "; on the edge of its grid: a better value may lie beyond" if one.on_edge else ""
        lines.append(f"{name}: {one.key} = {one.chosen} of {len(one.values)} tried ({tried}){edge}")
    return lines


def _matched(policy: AnyPolicy, policies: Mapping[str, AnyPolicy]) -> AnyPolicy:
    """The policy, with FLOPs matched to a variant that the tuning seeds run."""
    if not isinstance(policy, SftPolicy) or policy.matched_flops is None:
        return policy
    other = policies[policy.matched_flops]
    return policy.model_copy(update={"matched_flops": variant_name(policy.matched_flops, 0)}) if other.grid else policy
