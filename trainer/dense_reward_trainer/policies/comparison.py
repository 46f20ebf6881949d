"""The verdict of an evaluation: which policies answer better or worse than the first one.

Every policy answers the same prompts, so two are compared by the differences of their shares of right samples, prompt
by prompt: a t interval of the mean difference, and p-values with Holm's correction over all policies.
"""

from collections.abc import Iterator, Mapping, Sequence

from dense_reward_trainer.credit.paired import Comparison, compare
from dense_reward_trainer.rl.held_out_metrics import SampledResponse

LEVEL = 0.05
MIN_PROMPTS = 10
"""Prompts with a known answer below which a comparison says too little."""


def verdict_lines(samples: Mapping[str, Sequence[SampledResponse]]) -> Iterator[str]:
    """Sentences about every policy against the first. `samples`: the responses of each policy, in the same order."""
    first, *others = samples
    shares = {name: right_shares(found) for name, found in samples.items()}
    known = shares[first].keys()
    if not others:
        yield f"no verdict: {first} is the only policy; name others in policies"
        return
    if len(known) < MIN_PROMPTS:
        yield (
            f"no verdict: {len(known)} held-out prompts have a known answer, but it needs {MIN_PROMPTS}: give rows "
            "with final answers, or set held_out_options.checker"
        )
        return
    found = compare({name: [shares[name][at] - shares[first][at] for at in known] for name in others})
    better, worse = (
        {name: one for name, one in found.items() if one.p_holm < LEVEL and sign * one.interval.value > 0}
        for sign in (1, -1)
    )
    tests = f"p by a paired t-test over {len(known)} prompts, Holm, {len(found)} policies"
    if better:
        best = max(better, key=lambda name: better[name].interval.value)
        yield f"verdict: {best} answers more prompts right than {first}, {_difference(better[best])} ({tests})"
        if len(better) > 1:
            yield f"also better: {', '.join(f'{n}, {_difference(one)}' for n, one in better.items() if n != best)}"
    else:
        shown = max(found, key=lambda name: found[name].interval.value)
        most = f"the best is {shown}, {_difference(found[shown])}"
        yield f"verdict: no policy is surely better than {first}; {most} ({tests})"
    if worse:
        yield f"worse than {first}: {', '.join(f'{name}, {_difference(one)}' for name, one in worse.items())}"


def right_shares(samples: Sequence[SampledResponse]) -> dict[int, float]:
    """Index of a prompt -> its share of right samples; greedy responses and prompts without an answer are left out.

    Samples are in the order of the prompts, equally many for each. If there are greedy responses, each prompt has one.
    """
    greedy = sum(sample.greedy for sample in samples)
    drawn = [sample for sample in samples if not sample.greedy]
    size = len(drawn) // greedy if greedy else 1
    groups = [drawn[at : at + size] for at in range(0, len(drawn), size)]
    return {
        index: sum(sample.right is True for sample in group) / size
        for index, group in enumerate(groups)
        if group[0].right is not None
    }


def _difference(one: Comparison) -> str:
    found = one.interval
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}], p {one.p_holm:.2g}"
