"""Are the probabilities that a logistic fit derives from a score right? Expected calibration error (ECE)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

BINS = 10
_RIDGE = 1e-6  # keeps the weights finite if the scores separate the labels perfectly


@dataclass(frozen=True, slots=True)
class Calibration:
    """`expected_error`: mean over equally filled bins of |share that is right - mean probability| (ECE).

    `probability` and `share` hold one value per bin, from the least to the most probable.
    """

    expected_error: float
    probability: tuple[float, ...]
    share: tuple[float, ...]


def calibration(
    scores: Sequence[float], right: Sequence[bool], cluster: Sequence[int], seed: int
) -> Calibration | None:
    """P(right | score) by logistic regression on a random half of the clusters (Platt, 1999), judged on the other half.

    None if a half has fewer than two scores of either kind.
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
    """P(right) of new scores, after a logistic regression of labels (1: right, 0: wrong) on scores."""
    mean, deviation = scores_M.mean(), scores_M.std() or 1.0
    design_M2 = np.stack([np.ones_like(scores_M), (scores_M - mean) / deviation], axis=1)

    def loss(weights_2: NDArray[np.float64]) -> float:
        logit_M = design_M2 @ weights_2
        return float((np.logaddexp(0.0, logit_M) - label_M * logit_M).sum() + _RIDGE / 2 * (weights_2 @ weights_2))

    def slope(weights_2: NDArray[np.float64]) -> NDArray[np.float64]:
        gradient_2: NDArray[np.float64] = design_M2.T @ (expit(design_M2 @ weights_2) - label_M) + _RIDGE * weights_2
        return gradient_2

    def curvature(weights_2: NDArray[np.float64]) -> NDArray[np.float64]:
        fitted_M = expit(design_M2 @ weights_2)
        curvature_22: NDArray[np.float64] = design_M2.T @ (design_M2 * (fitted_M * (1 - fitted_M))[:, None])
        return curvature_22 + _RIDGE * np.eye(2)

    found = minimize(loss, np.zeros(2), method="trust-exact", jac=slope, hess=curvature, options={"gtol": 1e-9})
    probability_N: NDArray[np.float64] = expit(found.x[0] + found.x[1] * (new_N - mean) / deviation)
    return probability_N
