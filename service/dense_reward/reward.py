"""Log-probs, or the values of a token head -> the quantities of an answer. Pure numpy.

The reward is equation (5) of "Beyond Imitation: Recovering Dense Rewards from Demonstrations" (arXiv 2510.02493):
r_t = log pi_sft(a_t | s_t) - log pi_ref(a_t | s_t), undiscounted and unscaled. Every reward in an answer comes from
`log_ratio`, every centred reward from `minus_kl`. The reward of a token head is its value after the token.

Shapes are those of records.py: S scored tokens of one response, K ids at each of them.
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
    """Sum, mean and minimum of one response's signal, in nats. An empty response has neither mean nor minimum."""

    sum: float
    mean: float | None
    min: float | None


def log_ratio(sft_logprob: FloatArray, reference_logprob: FloatArray) -> FloatArray:
    """log pi_sft(a | s) - log pi_ref(a | s), in nats, elementwise: the reward of any token, sampled or not."""
    return sft_logprob - reference_logprob


def minus_kl(reward: FloatArray, kl: FloatArray) -> FloatArray:
    """reward - kl, in nats, elementwise: the centred reward of any token, sampled or not."""
    return reward - kl


def reward(scores: TokenScores) -> FloatArray:
    """r_t = sft_logprob - reference_logprob, [S] nats. Its sum over a response is the log-ratio of the response.

    Of a token head: its value after each token, which is not additive.
    """
    if scores.value_S is not None:
        return scores.value_S
    return log_ratio(scores.sft_logprob_S, scores.reference_logprob_S)


def candidate_reward(scores: TokenScores) -> FloatArray | None:
    """The reward of each candidate id, [S, K] nats; None if the branch had no candidates."""
    return _log_ratio_of(scores.candidate_sft_logprob_SK, scores.candidate_reference_logprob_SK)


def alternative_reward(scores: TokenScores) -> FloatArray | None:
    """The reward of each of the K = top_k likeliest ids under pi_sft, [S, K] nats; None if `top_k` was 0."""
    return _log_ratio_of(scores.top_sft_logprob_SK, scores.top_reference_logprob_SK)


def centred(scores: TokenScores) -> FloatArray:
    """r_t - KL(pi_sft(.|s_t) || pi_ref(.|s_t)), [S] nats. In every state its mean over samples from pi_sft is 0.

    Raises ValueError if the engine did not compute kl.
    """
    if scores.kl_S is None:
        raise ValueError("centred rewards need kl: set kl in the Wants of the engine")
    return minus_kl(reward(scores), scores.kl_S)


def signal(name: Signal, scores: TokenScores) -> FloatArray:
    """The chosen per-token signal, [S] nats. Raises ValueError like `centred`."""
    match name:
        case "reward":
            return reward(scores)
        case "centred":
            return centred(scores)
        case "sft_logprob":
            return scores.sft_logprob_S


def return_to_go(values_S: FloatArray, gamma: float = 1.0) -> FloatArray:
    """G_t = sum over k >= t of gamma^(k-t) x_k, [S], in the unit of the values. Accumulated in float64 from the end."""
    if gamma == 1.0:
        return np.cumsum(values_S[::-1], dtype=np.float64)[::-1].astype(np.float32)
    backwards = accumulate(reversed(values_S.tolist()), lambda later, value: value + gamma * later)
    return np.array([*backwards][::-1], dtype=np.float32)


def segment_sums(values_S: FloatArray, spans: Sequence[tuple[int, int]]) -> FloatArray:
    """Sums of the signal over half-open spans [start, end) of scored tokens, one sum per span: a reward for each step.

    Accumulated in float64. The spans must lie within the response; they can overlap or be empty.
    """
    prefix = np.concatenate([np.zeros(1), np.cumsum(values_S, dtype=np.float64)])
    return np.array([prefix[end] - prefix[start] for start, end in spans], dtype=np.float32)


def summarise(values_S: FloatArray) -> Summary:
    """Sum, mean and minimum of a response's signal. Accumulated in float64."""
    if len(values_S) == 0:
        return Summary(0.0, None, None)
    total = float(np.sum(values_S, dtype=np.float64))
    return Summary(total, total / len(values_S), float(values_S.min()))


def all_finite(arrays: Sequence[NDArray[np.floating] | None]) -> bool:
    """Whether no array holds NaN or an infinity. An array that is None was not computed, and is skipped."""
    return all(array is None or bool(np.isfinite(array).all()) for array in arrays)


def _log_ratio_of(sft_logprob_SK: FloatArray | None, reference_logprob_SK: FloatArray | None) -> FloatArray | None:
    if sft_logprob_SK is None or reference_logprob_SK is None:
        return None
    return log_ratio(sft_logprob_SK, reference_logprob_SK)
