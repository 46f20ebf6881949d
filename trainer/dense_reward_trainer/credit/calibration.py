"""Whether a probability that is read off a score can be believed. Pure numpy; knows no models and no text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 10
_STEPS, _RIDGE = 100, 1e-6


@dataclass(frozen=True, slots=True)
class Calibration:
    """`expected_error`: mean over equally filled bins of |share that is right - mean probability| (ECE).

    `probability` and `share` are those of the bins, from the least to the most probable.
    """

    expected_error: float
    probability: tuple[float, ...]
    share: tuple[float, ...]


def calibration(
    scores: Sequence[float], right: Sequence[bool], cluster: Sequence[int], seed: int
) -> Calibration | None:
    """P(right | score) by logistic regression on a random half of the clusters (Platt, 1999), judged on the other half.

    None where a half has fewer than two scores of either kind.
    """
    score_A, right_A = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=np.float64)
    chosen = np.random.default_rng(seed).permutation(np.unique(np.asarray(cluster)))
    fitted_A = np.isin(cluster, chosen[: len(chosen) // 2])
    if any(min(half.sum(), len(half) - half.sum()) < 2 for half in (right_A[fitted_A], right_A[~fitted_A])):
        return None
    is_right_N = right_A[~fitted_A]
    probability_N = logistic(score_A[fitted_A], right_A[fitted_A], score_A[~fitted_A])
    order_N = np.argsort(probability_N, kind="stable")
    bins = [part for part in np.array_split(order_N, BINS) if len(part)]
    probability = tuple(float(probability_N[part].mean()) for part in bins)
    share = tuple(float(is_right_N[part].mean()) for part in bins)
    weights = np.array([len(part) for part in bins]) / len(order_N)
    return Calibration(float(weights @ np.abs(np.subtract(share, probability))), probability, share)


def logistic(
    scores_M: NDArray[np.float64], label_M: NDArray[np.float64], new_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    """P(right) of new scores, after fitting scores with labels 1, right, and 0, by Newton's method."""
    mean, deviation = scores_M.mean(), scores_M.std() or 1.0
    design_M2 = np.stack([np.ones_like(scores_M), (scores_M - mean) / deviation], axis=1)
    weights_2 = np.zeros(2)
    for _ in range(_STEPS):
        fitted_M = _sigmoid(design_M2 @ weights_2)
        gradient_2 = design_M2.T @ (label_M - fitted_M) - _RIDGE * weights_2
        curvature_22 = design_M2.T @ (design_M2 * (fitted_M * (1 - fitted_M))[:, None]) + _RIDGE * np.eye(2)
        step_2 = np.linalg.solve(curvature_22, gradient_2)
        weights_2 += step_2 / max(1.0, float(np.abs(step_2).max()))
        if np.abs(step_2).max() < 1e-9:
            break
    return _sigmoid(weights_2[0] + weights_2[1] * (new_N - mean) / deviation)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -x))
