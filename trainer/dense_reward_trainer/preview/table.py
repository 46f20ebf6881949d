"""The tables of a preview as text. Pure; must not import models or tokenizers."""

from collections.abc import Iterator, Sequence

from dense_reward_trainer.preview.gains import Gains
from dense_reward_trainer.preview.ranking import AGGREGATES, Ranked
from dense_reward_trainer.preview.verdict import IN_WORDS, Counts, Verdict, in_words


def ranking_lines(ranking: Sequence[Ranked], counts: Counts) -> Iterator[str]:
    """A line for each signal: its AUROC by every aggregate."""
    yield f"{counts.right} right against {counts.wrong} wrong answers to {counts.prompts} prompts: AUROC by aggregate"
    if not ranking:
        yield "  nothing to rank: right and wrong answers are needed"
        return
    by_signal: dict[str, list[Ranked]] = {}
    for one in ranking:
        title = one.signal if one.reference is None else f"{one.signal}, {one.reference}"
        by_signal.setdefault(title, []).append(one)
    width = max(map(len, by_signal))
    yield f"  {'':{width}}  {'  '.join(f'{name:17}' for name in AGGREGATES)}".rstrip()
    for title, found in by_signal.items():
        yield f"  {title:{width}}  {'  '.join(f'{in_words(one.auroc):17}' for one in found)}".rstrip()


def gain_lines(gains: Gains | None) -> Iterator[str]:
    """A line for each policy: its share of right answers, and its difference to the SFT model."""
    if gains is None:
        yield "the gain is not known: too few prompts have several answers"
        return
    how = "sampled" if gains.how == "sampled" else "judged answers, reweighted"
    yield f"right answers to {gains.prompts} prompts ({how}), and the difference to SFT"
    lines = [(name, share, gains.free_over_sft.get(name)) for name, share in gains.free.items()]
    for name, gain in gains.tilted.items():
        lines.append((f"tilted, {name}", gain.share, gain.over["SFT"]))
        if gain.greedy is not None:
            lines.append((f"tilted, {name}, greedy", gain.greedy, None))
    width = max(len(name) for name, _, _ in lines)
    for name, share, over in lines:
        difference = "" if over is None else _signed(over.interval.value, over.interval.low, over.interval.high)
        yield f"  {name:{width}}  {in_words(share)}  {difference}".rstrip()
    for name, gain in gains.tilted.items():
        if gain.effective_samples is not None:
            yield f"  effective answers to each prompt under {name}: {gain.effective_samples:.1f}"


def verdict_lines(found: Verdict) -> Iterator[str]:
    """The verdicts on the references that were not chosen, then the one over all."""
    yield from (one.reason for name, one in found.references.items() if name != found.reference)
    yield f"verdict: {IN_WORDS[found.verdict]}"
    yield found.reason


def _signed(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
