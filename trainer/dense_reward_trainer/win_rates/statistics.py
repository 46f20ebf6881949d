"""Win rates with their intervals, length control and agreement of judges. Must not know files or judges."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import bootstrap

from dense_reward_trainer.credit.auroc import Interval, without_spread

Array = NDArray[np.float64]
RESAMPLES = 1000
_FOLDS = 5
_PENALTIES = np.logspace(-4, 4, 10)  # Cs of scikit-learn's LogisticRegressionCV, which alpaca_eval takes


def win_rate(scores_Q: Array, weights_Q: Array, seed: int) -> Interval:
    """Weighted mean of the questions' scores in [0, 1]. Raises ValueError for a score that is not in it."""
    return _resampled(
        lambda scores, weights: float((scores * weights).sum() / weights.sum()), seed, scores_Q, weights_Q
    )


def length_controlled(scores_Q: Array, lengths_Q: Array, baseline_lengths_Q: Array, seed: int) -> Interval | None:
    """The win rate that a logistic regression predicts for answers as long as the baseline's (2404.04475).

    P(win) = sigmoid(a + b * tanh(d / std(d))), d = the difference of lengths in characters; L1 penalty by 5-fold cross
    validation: `length_controlled_minimal` of alpaca_eval. Its leaderboard's formula has a term for the difficulty of
    each of its 805 questions, which was fitted to the leaderboard's models. None with fewer questions than folds.
    """
    count = len(scores_Q)
    if count < _FOLDS:
        return None
    difference_Q = lengths_Q - baseline_lengths_Q
    spread = float(np.std(difference_Q, ddof=1))
    terms_Q = np.tanh(difference_Q / spread) if spread > 0 else np.zeros(count)
    fold_Q = np.arange(count) % _FOLDS
    losses = [
        np.mean(
            [
                _loss(_fit(terms_Q[fold_Q != k], scores_Q[fold_Q != k], c), terms_Q[fold_Q == k], scores_Q[fold_Q == k])
                for k in range(_FOLDS)
            ]
        )
        for c in _PENALTIES
    ]
    chosen = float(_PENALTIES[int(np.argmin(losses))])
    return _resampled(lambda scores, terms: float(expit(_fit(terms, scores, chosen)[0])), seed, scores_Q, terms_Q)


def _fit(terms_Q: Array, scores_Q: Array, c: float) -> Array:
    """[a, b] with the least |a| + |b| + c * loss, as liblinear; each is a difference of two bounded variables."""
    design_Q2 = np.stack([np.ones_like(terms_Q), terms_Q], axis=1)

    def penalised(split_4: Array) -> tuple[float, Array]:
        logits_Q = design_Q2 @ (split_4[:2] - split_4[2:])
        loss = -(scores_Q * log_expit(logits_Q) + (1 - scores_Q) * log_expit(-logits_Q)).sum()
        slope_2 = c * (design_Q2.T @ (expit(logits_Q) - scores_Q))
        return float(split_4.sum() + c * loss), np.concatenate([slope_2, -slope_2]) + 1.0

    found = minimize(penalised, np.zeros(4), jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * 4)
    return np.asarray(found.x[:2] - found.x[2:], dtype=np.float64)


def _loss(weights_2: Array, terms_Q: Array, scores_Q: Array) -> float:
    logits_Q = weights_2[0] + weights_2[1] * terms_Q
    return float(-(scores_Q * log_expit(logits_Q) + (1 - scores_Q) * log_expit(-logits_Q)).mean())


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Agreement of two judges beyond chance (Cohen 1960): (observed - expected) / (1 - expected). NaN if undefined."""
    if not first:
        return float("nan")
    observed = np.mean([a == b for a, b in zip(first, second, strict=True)])
    expected = sum(first.count(label) * second.count(label) for label in {*first, *second}) / len(first) ** 2
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def _resampled(statistic: Callable[..., float], seed: int, scores_Q: Array, other_Q: Array) -> Interval:
    """Percentile interval; resamples whole questions. Equal scores, which show no spread: see `without_spread`."""
    if not ((scores_Q >= 0) & (scores_Q <= 1)).all():
        raise ValueError(f"scores must be between 0 and 1, but some of {scores_Q.tolist()} are not")
    value = statistic(scores_Q, other_Q)
    if np.ptp(scores_Q) == 0:
        return without_spread(value, len(scores_Q))
    found: Any = bootstrap(
        (scores_Q, other_Q),
        statistic,
        n_resamples=RESAMPLES,
        paired=True,
        vectorized=False,
        method="percentile",
        rng=seed,
    )
    return Interval(value, float(found.confidence_interval.low), float(found.confidence_interval.high))
