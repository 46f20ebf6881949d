"""The estimator study as figures and a table: gap closed, and its paired difference to the control.

Must not know how estimators work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.paired import Comparison, bounded_interval, compare, in_words
from dense_reward_trainer.studies.options.config import Curve
from dense_reward_trainer.text_table import aligned


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of an estimator, in the order of its seeds.

    `rates_tried`: the learning rates that were tried on the tuning task, in rising order. `tokens_to_half`: scored
    tokens until half of the gap was closed, null if half was not reached.
    """

    learning_rate: float
    rates_tried: tuple[float, ...]
    seeds: tuple[int, ...]
    gap_closed: tuple[float, ...]
    tokens_to_half: tuple[float | None, ...]

    @property
    def mean_gap(self) -> float:
        return float(np.mean(self.gap_closed))

    @property
    def median_tokens_to_half(self) -> float | None:
        """None if any seed did not reach half of the gap."""
        reached = [tokens for tokens in self.tokens_to_half if tokens is not None]
        return float(np.median(reached)) if len(reached) == len(self.tokens_to_half) else None

    @property
    def rate_on_edge(self) -> bool:
        """Whether a rate beyond those that were tried might be better."""
        return self.learning_rate in (min(self.rates_tried), max(self.rates_tried))


def outcome(curves: Sequence[Curve], rates_tried: Sequence[float]) -> Outcome:
    """The results of one estimator's reported runs."""
    return Outcome(
        curves[0].learning_rate,
        tuple(sorted(rates_tried)),
        tuple(curve.seed for curve in curves),
        tuple(curve.gap_closed[-1] for curve in curves),
        tuple(tokens_to(0.5, curve) for curve in curves),
    )


def gap_interval(gap_closed: Sequence[float]) -> Interval:
    """The mean over seeds with its interval, up to 1: no policy closes more than the gap to the optimum."""
    return bounded_interval(gap_closed, -np.inf, 1.0)


def differences_to(
    control: str, outcomes: Mapping[str, Outcome], families: Sequence[Sequence[str]]
) -> dict[str, Comparison]:
    """Gap closed minus the control's within every seed that both have; Holm's correction within each family."""
    at_control = dict(zip(outcomes[control].seeds, outcomes[control].gap_closed, strict=True))
    found: dict[str, Comparison] = {}
    for names in families:
        differences = {
            name: [gap - at_control[seed] for seed, gap in zip(one.seeds, one.gap_closed, strict=True)]
            for name, one in outcomes.items()
            if name in names
        }
        found |= compare(differences)
    return found


def tokens_to(share: float, curve: Curve) -> float | None:
    """Scored tokens until this share of the gap was first closed, by linear interpolation between evaluations."""
    for index in range(1, len(curve.gap_closed)):
        before, after = curve.gap_closed[index - 1 : index + 1]
        if after >= share:
            tokens_before, tokens_after = curve.scored_tokens[index - 1 : index + 1]
            return tokens_before + (tokens_after - tokens_before) * (share - before) / (after - before)
    return None


def format_table(outcomes: Mapping[str, Outcome], differences: Mapping[str, Comparison]) -> str:
    """One line for each estimator, the largest mean first. A rate with a `*` is the lowest or the highest tried."""
    head = ["estimator", "learning rate", "tried", "seeds", "gap closed", "minus control", "p, Holm", "tokens to half"]
    ordered = sorted(outcomes.items(), key=lambda pair: -pair[1].mean_gap)
    rows = [head, *([name, *_cells(one, differences.get(name))] for name, one in ordered)]
    return aligned(rows)


def _cells(one: Outcome, difference: Comparison | None) -> list[str]:
    half = one.median_tokens_to_half
    return [
        f"{one.learning_rate:g}{'*' if one.rate_on_edge else ''}",
        str(len(one.rates_tried)),
        str(len(one.seeds)),
        in_words(gap_interval(one.gap_closed)),
        "-" if difference is None else in_words(difference.interval),
        "-" if difference is None else f"{difference.p_holm:.2g}",
        "-" if half is None else f"{half:,.0f}",
    ]
