"""Figures of a cell of the regimes study. Must not know jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np

RewardFigures = Mapping[str, Mapping[str, float]]
"""AUROCs by column of the job credit: of each kind of planted error; of right against wrong samples, by aggregate."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy with one seed: accuracies on the test problems, tokens of sampled answers, nats per answer.

    A policy that chooses among samples has neither a greedy answer nor a KL: both are null.
    """

    sampled_accuracy: float
    greedy_accuracy: float | None
    length_tokens: float
    kl_to_sft: float | None

    @classmethod
    def of(cls, metrics: Mapping[str, object]) -> Self:
        """From a result of the job `evaluate`. Raises ValueError if there is no sampled accuracy."""
        values: dict[str, Any] = {field.name: _value(metrics.get(field.name)) for field in fields(cls)}
        if values["sampled_accuracy"] is None:
            raise ValueError("the evaluation has no sampled_accuracy: the test problems state no final answers")
        return cls(**values)

    def accuracy(self, metric: str) -> float:
        """The accuracy that counts under a metric; of a policy that chooses among samples, that of its choice."""
        found: float | None = getattr(self, metric)
        return self.sampled_accuracy if found is None else found


@dataclass(frozen=True, slots=True)
class CellFigures:
    """All policies of a cell; the share of right demonstrations (null if unknown).

    `start`: the model that SFT started from, null if it had random weights or is no milestone of the run. `rewards`:
    how good each reward is, by the policy whose training left it; empty if the study does not measure it.
    """

    policies: Mapping[str, Figures]
    demonstrations_right: float | None
    start: Figures | None
    rewards: Mapping[str, RewardFigures] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From its JSON."""
        policies = {name: Figures(**one) for name, one in values["policies"].items()}
        start = None if values["start"] is None else Figures(**values["start"])
        return cls(policies, values["demonstrations_right"], start, values.get("rewards", {}))


def at_matched_kl(curve: Sequence[Figures], kl: float | None) -> Figures:
    """The figures that a policy would have at an option where its KL is `kl`, by linear interpolation.

    `curve`: its figures at values with a rising KL. Beyond the last KL, it returns the last figures. Raises ValueError
    if a KL or a greedy accuracy is missing.
    """
    values = np.array([[getattr(one, field.name) for field in fields(Figures)] for one in curve], dtype=np.float64)
    if kl is None or np.isnan(values).any():
        raise ValueError("a KL can only be matched between policies that sample one answer, with a service")
    # measured KLs are noisy, and np.interp needs them to rise
    kls = np.maximum.accumulate(values[:, -1])
    return Figures(*(float(np.interp(kl, kls, column)) for column in values.T))


def _value(estimate: object) -> float | None:
    return float(estimate["value"]) if isinstance(estimate, Mapping) else None
