"""The verdict of a preview, from its tables. Pure; must not import models or tokenizers.

Every reference is judged by two figures. *Ranking*: does the reward, by some signal and aggregate, rank right above
wrong answers? *Gain*: training moves towards the policy that is tilted by the reward; is this policy right more often
than the SFT model and every free control? Intervals are 95 % over prompts. "Surely" means that the whole interval is on
that side. The first rule that holds decides:

1. unknown: fewer than 10 prompts, fewer than 30 answers, fewer than 5 prompts with a right answer, or fewer than 5 with
   a wrong one. If few prompts have answers of one kind, an interval over prompts is too narrow: it says little about
   other prompts.
2. no: the tilted policy is worse than the SFT model (interval of the difference below 0).
3. no: the best ranking of the reference is below chance (interval below 0.5).
4. gain: the best ranking is above chance (interval above 0.5, p < 0.05 after Holm's correction over all rankings), and
   the tilted policy is above the SFT model and every control (each interval above 0, the largest p-value below 0.05
   after Holm's correction over the references). The burden of proof is on the reward, because training costs.
5. control: a control is as good as the tilted policy (the tilted one is not ahead of it, or surely by less than 0.05),
   and one of two conditions holds: the tilted policy surely gains over the SFT model; or that control surely gains, and
   the tilted policy gains 0.05 or more.
6. no: the gain of the tilted policy over the SFT model is surely below 0.05; or it is below 0.05, but not surely, and a
   control that is as good surely gains.
7. no: no ranking is above chance, and the intervals are narrow enough to conclude this (the best AUROC surely below
   0.7; the gain over the SFT model, if it is known, surely below 0.1).
8. unknown: the intervals are too wide, or the gain is not known. More labelled answers can decide it.

The gain is not known if fewer than 10 prompts have several answers, or if judged answers are reweighted and count as
fewer than 1.5 answers to a prompt. Rules 2, 4, 5 and 6 then do not apply.

The verdict over all references is gain if one reference has it (the one whose tilted policy is right most often); else
unknown if one is unknown, because that one could still gain; else control; else no.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dense_reward_trainer.configs.signals import Aggregate, TokenSignal
from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.paired import Comparison
from dense_reward_trainer.preview.gains import SFT, Gain, Gains
from dense_reward_trainer.preview.ranking import Ranked

Kind = Literal["gain", "control", "no", "unknown"]
IN_WORDS: dict[Kind, str] = {
    "gain": "expect a gain",
    "control": "no more than a control gives",
    "no": "do not train on it",
    "unknown": "cannot tell",
}
MIN_PROMPTS, MIN_ANSWERS, MIN_OF_A_KIND = 10, 30, 5
AS_GOOD = 0.05
"""Shares of right answers that differ by less count as equal."""
USEFUL_AUROC, USEFUL_GAIN = 0.7, 0.1
"""An interval that includes chance says "no" only if it is below these."""
MIN_EFFECTIVE_SAMPLES = 1.5
"""Under fewer effective answers to a prompt, weights choose one answer, and say little about the tilted policy."""
LEVEL, CHANCE = 0.05, 0.5
_CURE_OF_GAIN = "give prompts with final answers, which are sampled, or more judged answers to each prompt"


@dataclass(frozen=True, slots=True)
class Counts:
    """The labelled answers, and how many prompts have right ones and wrong ones."""

    prompts: int
    right: int
    wrong: int
    prompts_with_right: int
    prompts_with_wrong: int


@dataclass(frozen=True, slots=True)
class ReferenceVerdict:
    """The verdict on one reference. `best`: its best ranking; null if nothing can be ranked. `reason`: a sentence."""

    verdict: Kind
    best: Ranked | None
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict over all references. `reference`, `signal` and `aggregate`: what it speaks of; null if of nothing."""

    verdict: Kind
    reference: str | None
    signal: TokenSignal | None
    aggregate: Aggregate | None
    reason: str
    references: dict[str, ReferenceVerdict]


def verdict(ranking: Sequence[Ranked], gains: Gains | None, counts: Counts, references: Sequence[str]) -> Verdict:
    """The verdict by the rules above. `gains`: null if no prompt has several answers and none were sampled."""
    if not references:
        reason = "no reference was given, so there is no reward: name one in references, or give a run that has some"
        return Verdict("unknown", None, None, None, reason, {})
    few = too_few(counts)
    found = {name: _of_reference(name, ranking, gains, few) for name in references}
    chosen = max(references, key=lambda name: _preference(name, found[name], gains))
    one = found[chosen]
    signal, how = (None, None) if one.best is None else (one.best.signal, one.best.aggregate)
    return Verdict(one.verdict, chosen, signal, how, one.reason, found)


def too_few(counts: Counts) -> str | None:
    """Why there are too few labelled answers for a verdict, with the cure; None if there are enough."""
    least = min(counts.prompts_with_right, counts.prompts_with_wrong)
    if counts.prompts >= MIN_PROMPTS and counts.right + counts.wrong >= MIN_ANSWERS and least >= MIN_OF_A_KIND:
        return None
    return (
        f"{counts.right} right and {counts.wrong} wrong answers to {counts.prompts} prompts are too few "
        f"({counts.prompts_with_right} prompts have a right one, {counts.prompts_with_wrong} a wrong one). At least "
        f"{MIN_OF_A_KIND} prompts with each kind, {MIN_ANSWERS} answers and {MIN_PROMPTS} prompts are needed: label "
        "more answers (raise prompts or samples_per_prompt, or give more rows)"
    )


def _of_reference(name: str, ranking: Sequence[Ranked], gains: Gains | None, few: str | None) -> ReferenceVerdict:
    own = [one for one in ranking if one.reference == name]
    best = max(own, key=lambda one: one.auroc.value, default=None)
    figures = "; ".join(_figures(name, best, gains))
    gain = None if gains is None else _known(gains, name)
    if few is not None or best is None:
        return ReferenceVerdict("unknown", best, f"{figures}: {IN_WORDS['unknown']}: {few}")
    kind, why = _rule(best, gains, gain)
    return ReferenceVerdict(kind, best, f"{figures}: {IN_WORDS[kind]}{why and ': ' + why}")


def _known(gains: Gains, name: str) -> Gain | None:
    """The gain of a reference, if there are prompts and effective samples enough to speak of it."""
    gain = gains.tilted.get(name)
    if gain is None or gains.prompts < MIN_PROMPTS:
        return None
    effective = gain.effective_samples
    return gain if effective is None or effective >= MIN_EFFECTIVE_SAMPLES else None


def _rule(best: Ranked, gains: Gains | None, gain: Gain | None) -> tuple[Kind, str]:
    """The first of rules 2 to 8 that holds, and what its figures do not say. `gain`: null if it is not known."""
    over = None if gain is None else gain.over[SFT].interval
    control = None if gains is None or gain is None else _as_good(gains, gain)
    narrow = best.auroc.high < USEFUL_AUROC and (over is None or over.high < USEFUL_GAIN)
    gains_too = over is not None and (over.low > 0 or over.value >= AS_GOOD)
    ahead = gain is not None and _is_above(gain.over.values()) and gain.p < LEVEL
    rules: tuple[tuple[bool, Kind, str], ...] = (
        (over is not None and over.high < 0, "no", "the tilted policy is worse than SFT"),
        (best.auroc.high < CHANCE, "no", "the reward ranks wrong answers above right ones"),
        (best.separates and ahead, "gain", ""),
        (control is not None and gains_too, "control", f"{control} is free, and as good"),
        (over is not None and over.high < AS_GOOD, "no", "the tilted policy is hardly better than SFT"),
        (control is not None, "no", f"the tilted policy is hardly better than SFT, and {control} is free and better"),
        (not best.separates and narrow, "no", "it does not separate right from wrong answers"),
        (gain is None, "unknown", f"the gain is not known: {_CURE_OF_GAIN}"),
        (True, "unknown", "the intervals are too wide: label more answers (raise prompts, or give more rows)"),
    )
    return next((kind, why) for holds, kind, why in rules if holds)


def _is_above(comparisons: Iterable[Comparison]) -> bool:
    return all(one.interval.low > 0 for one in comparisons)


def _as_good(gains: Gains, gain: Gain) -> str | None:
    """The best control that the tilted policy is not ahead of, if it or that control gains on the SFT model."""
    equal = [
        name
        for name, one in gain.over.items()
        if name != SFT and (one.interval.value <= 0 or one.interval.high < AS_GOOD)
    ]
    tilting_gains = gain.over[SFT].interval.low > 0
    gaining = [name for name in equal if tilting_gains or gains.free_over_sft[name].interval.low > 0]
    return max(gaining, key=lambda name: gains.free[name].value, default=None)


def _figures(name: str, best: Ranked | None, gains: Gains | None) -> Iterable[str]:
    """Such as `base reference, reward by min: 0.94 [0.90, 0.97]`, then the shares of right answers."""
    ranked = "no ranking" if best is None else f"{best.signal} by {best.aggregate}: {in_words(best.auroc)}"
    yield f"{titled(name)}, {ranked}"
    if gains is None or name not in gains.tilted:
        return
    controls = {control: share.value for control, share in gains.free.items() if control != SFT}
    control = max(controls, key=lambda one: controls[one])
    effective = gains.tilted[name].effective_samples
    how = "tilted" if effective is None else f"answers reweighted ({effective:.1f} effective of each prompt)"
    yield (
        f"{how} {gains.tilted[name].share.value:.2f} against {gains.free[SFT].value:.2f} (SFT) and "
        f"{controls[control]:.2f} (best control, {control})"
    )


def titled(reference: str) -> str:
    """Such as `base reference`; the name `reference` stays alone."""
    return reference if reference.endswith("reference") else f"{reference} reference"


def in_words(one: Interval) -> str:
    """`0.94 [0.90, 0.97]`."""
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"


_ORDER: tuple[Kind, ...] = ("no", "control", "unknown", "gain")


def _preference(name: str, found: ReferenceVerdict, gains: Gains | None) -> tuple[int, float, float]:
    """References with a larger value are preferred: by verdict, then by the tilted policy's share, then by ranking."""
    gain = None if gains is None else gains.tilted.get(name)
    share = -1.0 if gain is None else gain.share.value
    return _ORDER.index(found.verdict), share, -1.0 if found.best is None else found.best.auroc.value
