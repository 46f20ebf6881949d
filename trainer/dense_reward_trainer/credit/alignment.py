"""Where gradients point, compared with a target direction, and which reference points there best. Knows no job."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dense_reward_trainer.credit.paired import holm, paired_interval, paired_p

LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Alignment:
    """Gradient directions of N batches of samples, compared with a target direction.

    `cosine`: between the direction of a batch and the target, mean over batches; `cosines` are those of the batches.
    `agreement`: cosine between two batches, mean over pairs; 1 if batches are noise-free; its standard error is
    computed under pure noise. `expected_cosine`: between the expected gradient and the target, cosine /
    sqrt(agreement), if each batch is the expected gradient plus independent noise; null if the agreement is within two
    standard errors of 0.
    """

    cosine: float
    cosine_standard_error: float
    agreement: float
    agreement_standard_error: float
    expected_cosine: float | None
    expected_cosine_standard_error: float | None
    cosines: tuple[float, ...]


def alignment(directions: Iterable[Tensor], target: Tensor) -> Alignment:
    """Compares three or more directions with a target; none of them is 0. Holds two directions in memory at a time.

    Raises ValueError for fewer than three directions.
    """
    unit = normalize(target, dim=0)
    total = torch.zeros_like(unit)
    cosines: list[float] = []
    neighbours: list[float] = []
    previous = torch.zeros_like(unit)
    for direction in directions:
        current = normalize(direction, dim=0)
        cosines.append(float(current @ unit))
        neighbours.append(float(current @ previous))
        total += current
        previous = current
    count = len(cosines)
    if count < 3:
        raise ValueError(f"agreement needs at least 3 batches, but there are {count}")
    cosine, error = mean(cosines), stdev(cosines) / sqrt(count)
    # |sum of unit vectors|^2 = count + sum of the cosines of all ordered pairs
    agreement = (float(total.double().square().sum()) - count) / (count * (count - 1))
    # Under pure noise the cosines of two pairs of batches are uncorrelated, even if both pairs share a batch. So the
    # standard error over all pairs is the spread over neighbouring batches / sqrt(number of pairs).
    noise = stdev(neighbours[1:]) / sqrt(count * (count - 1) / 2)
    if agreement <= 2 * noise:
        return Alignment(cosine, error, agreement, noise, None, None, tuple(cosines))
    expected = cosine / sqrt(agreement)
    spread = sqrt((error / sqrt(agreement)) ** 2 + (expected * noise / (2 * agreement)) ** 2)
    return Alignment(cosine, error, agreement, noise, expected, spread, tuple(cosines))


def alignment_lines(found: Mapping[str, Alignment]) -> Iterator[str]:
    """A table with a line for each reference, which is named by its pair."""
    width = max(map(len, ("reference", *found)))
    yield "cosine with the gradient of the held-out log-likelihood, ± standard error (1: its direction, 0: unrelated)"
    yield "agreement: cosine between the gradients of two batches, not with the held-out answers (1: no noise)"
    yield f"  {'reference':{width}}  {'of one batch':14}  {'agreement':14}  of the expected gradient"
    for name, one in found.items():
        batch, two = _cell(one.cosine, one.cosine_standard_error), _cell(one.agreement, one.agreement_standard_error)
        yield f"  {name:{width}}  {batch:14}  {two:14}  {_expected(one)}"


def alignment_verdict(found: Mapping[str, Alignment]) -> Iterator[str]:
    """Which reference to use, or that none helps, and which ones point away, as sentences.

    A reference helps if its mean cosine is above 0 by a t-test over batches, with Holm's correction over references.
    Every reference has the same batches of samples, so two of them are compared by their differences batch by batch.
    """
    p_holm, helping = _p_values(found), _helping(found)
    best = best_reference(found)
    if best is not None:
        yield f"use the reference {best}: its cosine is {found[best].cosine:.3f}, p {p_holm[best]:.2g} that it is 0"
        as_good = [name for name in helping if name != best and not _surely_above(found[best], found[name])]
        if as_good:
            yield f"not surely worse than {best}: {', '.join(as_good)}; raise batches to compare them"
    else:
        yield "no reference helps here: no cosine is above 0 by more than noise; raise batches, or do not train on them"
    for name, one in found.items():
        if one.cosine < 0 and p_holm[name] < LEVEL:
            yield f"points away from the held-out answers, do not train on it: {name} ({one.cosine:.3f})"
    yield "this takes the held-out answers as good; dense-reward-train credit judges answers"


def best_reference(found: Mapping[str, Alignment]) -> str | None:
    """The reference that helps most; None if none helps."""
    return max(_helping(found), key=lambda name: found[name].cosine, default=None)


def _p_values(found: Mapping[str, Alignment]) -> dict[str, float]:
    return holm({name: paired_p(one.cosines) for name, one in found.items()})


def _helping(found: Mapping[str, Alignment]) -> list[str]:
    p_holm = _p_values(found)
    return [name for name, one in found.items() if one.cosine > 0 and p_holm[name] < LEVEL]


def _surely_above(best: Alignment, other: Alignment) -> bool:
    differences = [one - another for one, another in zip(best.cosines, other.cosines, strict=True)]
    return paired_interval(differences).low > 0


def _expected(one: Alignment) -> str:
    if one.expected_cosine is None or one.expected_cosine_standard_error is None:
        return "unknown, the noise hides it: raise batches"
    return f"{one.expected_cosine:.2f} ± {one.expected_cosine_standard_error:.2f}"


def _cell(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"
