"""How right a policy tilted by the reward is, beside the SFT model and what that gives for free. Pure.

A policy's share is the share of its answers to a prompt that are right, [P] over prompts. Policies are compared on the
same prompts, so their differences are paired. Must not import models or tokenizers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dense_reward_trainer.credit.auroc import Interval, without_spread
from dense_reward_trainer.credit.paired import Comparison, holm, paired_interval, paired_p, share_interval

How = Literal["sampled", "reweighted"]
SFT = "SFT"
Shares = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Gain:
    """The tilted policy of one reference, as shares of right answers.

    `over`: its difference to the SFT model (under the name SFT) and to each control, by name; Holm's correction of
    `p_holm` is over the references. `p`: p-value of "it is not above all of them", the largest of `over` (an
    intersection-union test, Berger, 1982), after Holm's correction over the references.
    `effective_samples`: of the answers to one prompt, their effective number under the weights, mean over prompts; null
    if the policy was sampled. `greedy`: its most likely answers, token by token; null if it was not sampled.
    """

    share: Interval
    over: dict[str, Comparison]
    p: float
    effective_samples: float | None = None
    greedy: Interval | None = None


@dataclass(frozen=True, slots=True)
class Gains:
    """The shares of all policies on the same `prompts`.

    `how`: every policy was sampled, or answers of the SFT model were weighted. `free`: the SFT model and the controls,
    which need no reference and no training. `free_over_sft`: difference of each control to the SFT model. `tilted`: by
    reference.
    """

    how: How
    prompts: int
    free: dict[str, Interval]
    free_over_sft: dict[str, Comparison]
    tilted: dict[str, Gain]


@dataclass(frozen=True, slots=True)
class Tilted:
    """Shares of a tilted policy, [P], and what else is known of it: see Gain."""

    share: Sequence[float]
    effective_samples: float | None = None
    greedy: Sequence[float] | None = None


def compare_policies(how: How, free: Shares, tilted: Mapping[str, Tilted]) -> Gains:
    """All comparisons. `free` has the SFT model under the name SFT. Raises ValueError for fewer than two prompts."""
    over = {name: {other: _difference(one.share, free[other]) for other in free} for name, one in tilted.items()}
    adjusted = {other: holm({name: found[other][1] for name, found in over.items()}) for other in free}
    above_all = holm({name: max(p for _, p in found.values()) for name, found in over.items()})
    gains = {}
    for name, one in tilted.items():
        comparisons = {
            other: Comparison(interval, p, adjusted[other][name]) for other, (interval, p) in over[name].items()
        }
        greedy = None if one.greedy is None else spread_of(one.greedy, low=0.0)
        gains[name] = Gain(spread_of(one.share, low=0.0), comparisons, above_all[name], one.effective_samples, greedy)
    controls = {name: _difference(share, free[SFT]) for name, share in free.items() if name != SFT}
    together = holm({name: p for name, (_, p) in controls.items()})
    return Gains(
        how,
        len(free[SFT]),
        {name: spread_of(share, low=0.0) for name, share in free.items()},
        {name: Comparison(interval, p, together[name]) for name, (interval, p) in controls.items()},
        gains,
    )


def _difference(one: Sequence[float], other: Sequence[float]) -> tuple[Interval, float]:
    differences = [float(a - b) for a, b in zip(one, other, strict=True)]
    return spread_of(differences, low=-1.0), paired_p(differences)


def spread_of(values: Sequence[float], *, low: float) -> Interval:
    """The mean of values between `low` and 1, one for each prompt, with a 95 % interval by Student's t."""
    found = share_interval(values) if low == 0.0 else paired_interval(values)
    return found if found.low < found.high else without_spread(found.value, len(values), low=low)


def reweighted(log_weights: Sequence[float], right: Sequence[bool], prompt: Sequence[int]) -> Tilted:
    """Shares under weights, self-normalised within every prompt that has several answers.

    If the answers to a prompt were drawn from pi_sft and the log-weights are a times the summed rewards, this estimates
    the accuracy of the policy pi_sft(y) (pi_sft(y) / pi_ref(y))^a over whole answers; from few answers, that of the
    choice of one of them. Effective samples: (sum of weights)^2 / sum of squared weights (Kong, 1992).
    """
    share, effective = [], []
    for places in several(prompt):
        log_weight_G: NDArray[np.float64] = np.asarray([log_weights[i] for i in places], dtype=np.float64)
        weight_G = np.exp(log_weight_G - log_weight_G.max())
        weight_G /= weight_G.sum()
        share.append(min(1.0, float(weight_G[[right[i] for i in places]].sum())))
        effective.append(float(1 / np.square(weight_G).sum()))
    return Tilted(share, float(np.mean(effective)) if effective else 0.0)


def likeliest(scores: Sequence[float], right: Sequence[bool], prompt: Sequence[int]) -> list[float]:
    """For every prompt with several answers, whether its highest score is right; equal ones count in part."""
    shares = []
    for places in several(prompt):
        highest = max(scores[i] for i in places)
        shares.append(float(np.mean([right[i] for i in places if scores[i] == highest])))
    return shares


def several(prompt: Sequence[int]) -> list[list[int]]:
    """The places of the answers to each prompt that has two or more, in the order of the prompts."""
    places: dict[int, list[int]] = {}
    for i, one in enumerate(prompt):
        places.setdefault(one, []).append(i)
    return [found for _, found in sorted(places.items()) if len(found) > 1]
