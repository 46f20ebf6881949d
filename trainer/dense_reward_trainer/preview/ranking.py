"""How well each signal and aggregate ranks right above wrong answers. Pure; must not import models or tokenizers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from dense_reward_trainer.configs.signals import Aggregate, TokenSignal
from dense_reward_trainer.credit.aggregates import aggregate
from dense_reward_trainer.credit.auroc import Interval, auroc, auroc_draws, interval_of_draws
from dense_reward_trainer.credit.paired import holm
from dense_reward_trainer.credit.signals import FROM_REFERENCE, ONE_MODEL, token_signals
from dense_reward_trainer.rl.records import TokenArrays

AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)
RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Scored:
    """One number for each of N answers: an aggregate of a signal; `reference` is null for the SFT model's own."""

    reference: str | None
    signal: TokenSignal
    aggregate: Aggregate
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Ranked:
    """How one score ranks: AUROC of right against wrong answers, with a 95 % bootstrap interval over prompts.

    `p_holm`: two-sided p-value of "it ranks by chance", after Holm's correction over all scores that need a reference;
    null for those of the SFT model alone, which are shown and not tested.
    """

    reference: str | None
    signal: TokenSignal
    aggregate: Aggregate
    auroc: Interval
    p_holm: float | None

    @property
    def separates(self) -> bool:
        """Whether it surely ranks right above wrong."""
        return self.p_holm is not None and self.p_holm < 0.05 and self.auroc.low > 0.5


def scores_of(reference: str | None, answers: Sequence[TokenArrays], window: int) -> list[Scored]:
    """Every score of the answers under one reference; null: those of the SFT model alone."""
    names = ONE_MODEL if reference is None else FROM_REFERENCE
    signals = [token_signals(arrays, names) for arrays in answers]
    return [
        Scored(reference, name, how, tuple(aggregate(found[name], how, window) for found in signals))
        for name in names
        for how in AGGREGATES
    ]


def rank_all(scores: Sequence[Scored], right: Sequence[bool], prompt: Sequence[int], seed: int) -> list[Ranked]:
    """The AUROC of every score; none if all answers are right, or wrong. `prompt`: the index of each one's prompt."""
    if all(right) or not any(right):
        return []
    right_N = np.asarray(right, dtype=np.bool_)
    draws = [auroc_draws(one.values, right, prompt, seed, RESAMPLES) for one in scores]
    tested = {str(i): _chance_p(draws[i]) for i, one in enumerate(scores) if one.reference is not None}
    adjusted: Mapping[str, float] = holm(tested)
    ranked = []
    for i, one in enumerate(scores):
        value_N = np.asarray(one.values)
        value = auroc(value_N[right_N], value_N[~right_N])
        interval = interval_of_draws(value, draws[i], right, prompt)
        ranked.append(Ranked(one.reference, one.signal, one.aggregate, interval, adjusted.get(str(i))))
    return ranked


def _chance_p(draws_R: NDArray[np.float64]) -> float:
    """Two-sided p-value of "AUROC is 0.5", by inverting the percentile interval; never below 2 / (R + 1)."""
    least = min(int((draws_R <= 0.5).sum()), int((draws_R >= 0.5).sum()))
    return min(1.0, 2 * (1 + least) / (len(draws_R) + 1))
