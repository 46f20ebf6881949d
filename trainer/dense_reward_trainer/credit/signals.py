"""The signals of every token of a scored response: four of the SFT model alone, and two that also need a reference.

| signal | formula at state s and token a |
|---|---|
| sft_logprob | log pi_sft(a given s) |
| entropy_corrected | sft_logprob + H, where H is the entropy of pi_sft at s; mean 0 under pi_sft in every state |
| z_score | entropy_corrected / sqrt(V + 0.001), where V is the variance of log pi_sft(a given s) under pi_sft |
| margin | sft_logprob - max over b of log pi_sft(b given s); 0 for the likeliest token |
| reward | sft_logprob - log pi_ref(a given s), equation 5 of arXiv 2510.02493 |
| centred | reward - KL(pi_sft || pi_ref) at s; mean 0 under pi_sft in every state |

entropy_corrected is the expected information of a token less its own, the quantity that locally typical sampling keeps
near 0 (Meister et al., arXiv 2202.00666). V is called varentropy. Signals of the SFT model alone are the controls of
the reward: they need no reference.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
from dense_reward import ScoredResponse
from dense_reward.records import FloatArray
from dense_reward.schemas import ArrayName, ModelCard

from dense_reward_trainer.configs.signals import TokenSignal
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.records import TokenArrays

Scores = ScoredResponse | TokenArrays
SIGNALS: tuple[TokenSignal, ...] = get_args(TokenSignal)
FROM_REFERENCE: tuple[TokenSignal, ...] = ("reward", "centred")
ONE_MODEL: tuple[TokenSignal, ...] = tuple(name for name in SIGNALS if name not in FROM_REFERENCE)
VARIANCE_FLOOR = 1e-3
"""Added to the variance in nats^2. Without it, the z-scores of states with one possible token would be rounding."""
# signal -> the arrays of an answer that it is computed from. `alternatives` is requested with top_k, not include.
ARRAYS: Mapping[TokenSignal, tuple[str, ...]] = {
    "sft_logprob": ("sft_logprob",),
    "entropy_corrected": ("sft_logprob", "entropy"),
    "z_score": ("sft_logprob", "entropy", "varentropy"),
    "margin": ("sft_logprob", "alternatives"),
    "reward": ("reward",),
    "centred": ("centred",),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What to request of the service, so that signals can be computed: arrays, and the number of likeliest ids."""

    include: tuple[ArrayName, ...]
    top_k: int


def offered(card: ModelCard) -> tuple[TokenSignal, ...]:
    """The signals that a served pair can give, or a token head, which has the reward alone; in the order of SIGNALS."""
    given = {"reward", *card.offered}
    return tuple(name for name in SIGNALS if given.issuperset(ARRAYS[name]))


def request_for(names: Collection[TokenSignal]) -> Request:
    """The request whose answer holds all that these signals need."""
    arrays = {array for name in names for array in ARRAYS[name]}
    include = sorted(arrays - {"alternatives"})
    return Request(tuple(cast(ArrayName, array) for array in include), int("alternatives" in arrays))


def token_signals(scored: Scores, names: Collection[TokenSignal]) -> dict[TokenSignal, FloatArray]:
    """Each signal of each token, [T] float32. Raises JobError if an array that a signal needs is missing."""
    return {name: _FORMULAS[name](scored) for name in names}


def _array(scored: Scores, name: str) -> FloatArray:
    values_T: FloatArray | None = getattr(scored, name, None)
    if values_T is None:
        raise JobError(f"the service returned no {name}")
    return values_T


def _entropy_corrected(scored: Scores) -> FloatArray:
    return _array(scored, "sft_logprob") + _array(scored, "entropy")


def _z_score(scored: Scores) -> FloatArray:
    deviation_T = np.sqrt(_array(scored, "varentropy") + np.float32(VARIANCE_FLOOR))
    values_T: FloatArray = _entropy_corrected(scored) / deviation_T
    return values_T


def _margin(scored: Scores) -> FloatArray:
    if isinstance(scored, TokenArrays):
        return scored.sft_logprob - scored.largest_logprob
    if scored.alternatives is None or not all(scored.alternatives):
        raise JobError("the service returned no alternatives, which margin needs")
    return _array(scored, "sft_logprob") - np.array([top[0].sft_logprob for top in scored.alternatives], np.float32)


_FORMULAS: Mapping[TokenSignal, Callable[[Scores], FloatArray]] = {
    "sft_logprob": lambda scored: _array(scored, "sft_logprob"),
    "entropy_corrected": _entropy_corrected,
    "z_score": _z_score,
    "margin": _margin,
    "reward": lambda scored: _array(scored, "reward"),
    "centred": lambda scored: _array(scored, "centred"),
}
