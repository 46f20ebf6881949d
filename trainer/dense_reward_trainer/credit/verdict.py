"""Which reference separates right from wrong answers better than the SFT model alone does, or that none does.

For every reference, its best ranking (signal and aggregate) is compared with the best one-model control: a paired
bootstrap over prompts of the difference of their AUROCs, with Holm's correction over the references. Both sides of the
comparison are the best of several, the control of at least as many; so choice does not favour the reference.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dense_reward_trainer.configs.signals import Aggregate
from dense_reward_trainer.credit.auroc import Interval, auroc_draws
from dense_reward_trainer.credit.judged_answers import JudgedAnswers, Rankings
from dense_reward_trainer.credit.paired import Comparison, holm
from dense_reward_trainer.credit.references import pair_of

RESAMPLES = 2000
MIN_PROMPTS = 10
"""Prompts with a right answer, and with a wrong one, below which a bootstrap over prompts says too little."""
LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to rank: a column, an aggregate, and the AUROC with its 95 % interval."""

    column: str
    aggregate: Aggregate
    auroc: Interval

    def __str__(self) -> str:
        found = self.auroc
        return f"{self.column} by {self.aggregate}, AUROC {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


@dataclass(frozen=True, slots=True)
class AgainstControl:
    """The best ranking of one reference, and the difference of its AUROC to that of the control."""

    best: Choice
    difference: Comparison

    @property
    def helps(self) -> bool:
        """Whether it ranks better than chance, and better than the control after the correction."""
        surely_more = self.difference.interval.low > 0 and self.difference.p_holm < LEVEL
        return surely_more and self.best.auroc.low > 0.5


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the comparison.

    `use`: the pair to train on; null if no reference helps, or if there are too few answers. `references`: by pair;
    empty if there are too few answers. `worse_than_chance`: all rankings whose interval is below 0.5. `words`: the
    verdict and its reasons, one sentence each.
    """

    use: str | None
    control: Choice
    references: dict[str, AgainstControl]
    worse_than_chance: tuple[Choice, ...]
    words: tuple[str, ...]


def verdict(answers: JudgedAnswers, ranking: Rankings, seed: int) -> Verdict:
    """The verdict on answers and their ranking. `seed` is that of the bootstrap."""
    choices = [Choice(column, name, one.auroc) for column, found in ranking.items() for name, one in found.items()]
    control = _best(choice for choice in choices if pair_of(choice.column) is None)
    worse = tuple(choice for choice in choices if choice.auroc.high < 0.5)
    few = too_few(answers)
    if few is not None:
        return Verdict(None, control, {}, (), (few,))
    pairs = dict.fromkeys(pair for choice in choices if (pair := pair_of(choice.column)) is not None)
    best = {pair: _best(choice for choice in choices if pair_of(choice.column) == pair) for pair in pairs}
    found = _against(control, best, answers, seed)
    helping = [one.best for one in found.values() if one.helps]
    use = pair_of(_best(helping).column) if helping else None
    return Verdict(use, control, found, worse, tuple(_words(use, control, found, choices, worse)))


def too_few(answers: JudgedAnswers) -> str | None:
    """Why there are too few answers for a verdict, with the cure; None if there are enough."""
    with_right = {prompt for prompt, right in zip(answers.prompt, answers.right, strict=True) if right}
    with_wrong = {prompt for prompt, right in zip(answers.prompt, answers.right, strict=True) if not right}
    if min(len(with_right), len(with_wrong)) >= MIN_PROMPTS:
        return None
    return (
        f"no verdict: {len(with_right)} prompts have a right answer and {len(with_wrong)} have a wrong one, but it "
        f"needs {MIN_PROMPTS} of each: raise samples, or give more prompts"
    )


def _best(choices: Iterable[Choice]) -> Choice:
    return max(choices, key=lambda choice: choice.auroc.value)


def _against(
    control: Choice, best: Mapping[str, Choice], answers: JudgedAnswers, seed: int
) -> dict[str, AgainstControl]:
    control_R = _draws(control, answers, seed)
    differences: dict[str, NDArray[np.float64]] = {
        pair: _draws(choice, answers, seed) - control_R for pair, choice in best.items()
    }
    alone = {pair: _bootstrap_p(difference_R) for pair, difference_R in differences.items()}
    together = holm(alone)
    found = {}
    for pair, choice in best.items():
        low, high = np.percentile(differences[pair], [2.5, 97.5])
        interval = Interval(choice.auroc.value - control.auroc.value, float(low), float(high))
        found[pair] = AgainstControl(choice, Comparison(interval, alone[pair], together[pair]))
    return found


def _draws(choice: Choice, answers: JudgedAnswers, seed: int) -> NDArray[np.float64]:
    scores = answers.scores[choice.column][choice.aggregate]
    return auroc_draws(scores, answers.right, answers.prompt, seed, RESAMPLES)


def _bootstrap_p(difference_R: NDArray[np.float64]) -> float:
    """Two-sided p-value of "the difference is 0" by inverting the percentile interval; never below 2 / (R + 1)."""
    least = min(int((difference_R <= 0).sum()), int((difference_R >= 0).sum()))
    return min(1.0, 2 * (1 + least) / (len(difference_R) + 1))


def _words(
    use: str | None,
    control: Choice,
    found: Mapping[str, AgainstControl],
    choices: Iterable[Choice],
    worse: Iterable[Choice],
) -> Iterable[str]:
    shown = max(found.values(), key=lambda one: one.best.auroc.value) if use is None else found[use]
    interval = shown.difference.interval
    compared = (
        f"the best signal of the SFT model alone is {control}; difference {interval.value:+.3f} "
        f"[{interval.low:+.3f}, {interval.high:+.3f}], p {shown.difference.p_holm:.3f} (Holm, {len(found)} references)"
    )
    if use is not None:
        yield f"use the reference {use}: {shown.best}; {compared}"
        also = [pair for pair, one in found.items() if one.helps and pair != use]
        if also:
            yield f"these references help too: {', '.join(also)}"
    else:
        yield f"no reference helps here: the best is {shown.best}; {compared}"
    if all(choice.auroc.low <= 0.5 for choice in choices):
        yield "nothing here separates right from wrong answers: do not train on any of these signals"
    by_column: dict[str, list[str]] = {}
    for choice in worse:
        by_column.setdefault(choice.column, []).append(f"{choice.aggregate} {choice.auroc.value:.3f}")
    for column, values in by_column.items():
        yield f"worse than chance, do not train on it: {column} ({', '.join(values)})"
