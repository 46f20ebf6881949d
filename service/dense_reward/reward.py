"""Log-probs -> the quantities that the service answers. Pure numpy; each quantity is defined here and nowhere else.

The reward is equation (5) of "Beyond Imitation: Recovering Dense Rewards from Demonstrations" (arXiv 2510.02493):
r_t = log pi_sft(a_t | s_t) - log pi_ref(a_t | s_t), undiscounted, without a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dense_reward.records import FloatArray, TokenScores

Signal = Literal["reward", "centred", "sft_logprob"]


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one response, in nats. `mean` and `min` of an empty response do not exist."""

    sum: float
    mean: float | None
    min: float | None


def log_ratio(sft_logprob: FloatArray, reference_logprob: FloatArray) -> FloatArray:
    """log pi_sft(a | s) - log pi_ref(a | s), in nats, elementwise: the reward of any token, sampled or not."""
    return sft_logprob - reference_logprob


def less_kl(reward: FloatArray, kl: FloatArray) -> FloatArray:
    """reward - kl, in nats, elementwise: the centred reward of any token, sampled or not."""
    return reward - kl


def reward(scores: TokenScores) -> FloatArray:
    """r_t = sft_logprob - reference_logprob, [S] nats. Its sum over a response is the sequence log-ratio."""
    return log_ratio(scores.sft_logprob_S, scores.reference_logprob_S)


def candidate_reward(scores: TokenScores) -> FloatArray | None:
    """The reward of each candidate id, [S, K] nats; None if no candidates were named."""
    return _log_ratio_of(scores.candidate_sft_logprob_SK, scores.candidate_reference_logprob_SK)


def alternative_reward(scores: TokenScores) -> FloatArray | None:
    """The reward of each of the likeliest ids, [S, K] nats; None if `top_k` was 0."""
    return _log_ratio_of(scores.top_sft_logprob_SK, scores.top_reference_logprob_SK)


def centred(scores: TokenScores) -> FloatArray:
    """r_t - KL(pi_sft(.|s_t) || pi_ref(.|s_t)), [S] nats: mean 0 at every state under samples from pi_sft.

    Raises ValueError where the engine was not asked for kl.
    """
    if scores.kl_S is None:
        raise ValueError("centred rewards need kl: ask the engine for it")
    return less_kl(reward(scores), scores.kl_S)


def signal(name: Signal, scores: TokenScores) -> FloatArray:
    """The chosen per-token signal, [S] nats."""
    match name:
        case "reward":
            return reward(scores)
        case "centred":
            return centred(scores)
        case "sft_logprob":
            return scores.sft_logprob_S


def return_to_go(values_S: FloatArray, gamma: float = 1.0) -> FloatArray:
    """G_t = sum over k >= t of gamma^(k-t) x_k, [S], accumulated in float64 from the end."""
    if gamma == 1.0:
        return np.cumsum(values_S[::-1], dtype=np.float64)[::-1].astype(np.float32)
    backwards = accumulate(reversed(values_S.tolist()), lambda later, value: value + gamma * later)
    return np.array([*backwards][::-1], dtype=np.float32)


def segment_sums(values_S: FloatArray, spans: Sequence[tuple[int, int]]) -> FloatArray:
    """Sums of the signal over half-open token spans [start, end), for process-reward users."""
    prefix = np.concatenate([np.zeros(1), np.cumsum(values_S, dtype=np.float64)])
    return np.array([prefix[end] - prefix[start] for start, end in spans], dtype=np.float32)


def summarise(values_S: FloatArray) -> Summary:
    """Sum, mean and min of a response's signal; accumulated in float64."""
    if len(values_S) == 0:
        return Summary(0.0, None, None)
    total = float(np.sum(values_S, dtype=np.float64))
    return Summary(total, total / len(values_S), float(values_S.min()))


def all_finite(arrays: Sequence[NDArray[np.floating] | None]) -> bool:
    """Whether every number that would be answered is finite."""
    return all(array is None or bool(np.isfinite(array).all()) for array in arrays)


def _log_ratio_of(sft_logprob_SK: FloatArray | None, reference_logprob_SK: FloatArray | None) -> FloatArray | None:
    if sft_logprob_SK is None or reference_logprob_SK is None:
        return None
    return log_ratio(sft_logprob_SK, reference_logprob_SK)
