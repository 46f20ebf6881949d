"""The verdict of an evaluation: paired differences of right answers against the first policy."""

from collections.abc import Sequence

from dense_reward_trainer.policies.comparison import right_shares, verdict_lines
from dense_reward_trainer.rl.held_out_metrics import SampledResponse


def sampled(rights: Sequence[bool | None], *, greedy: bool = False) -> list[SampledResponse]:
    return [SampledResponse("file:1", greedy, "a", None, "1", right, True, 3) for right in rights]


def policy(shares: Sequence[tuple[bool | None, bool | None]]) -> list[SampledResponse]:
    """A greedy response to each prompt, then two samples."""
    drawn = [right for pair in shares for right in pair]
    return sampled([False] * len(shares), greedy=True) + sampled(drawn)


def test_shares_are_those_of_samples_of_prompts_with_a_known_answer() -> None:
    found = right_shares(policy([(True, False), (None, None), (True, True)]))
    assert found == {0: 0.5, 2: 1.0}
    assert right_shares(sampled([True, False])) == {0: 1.0, 1: 0.0}, "a policy that chooses has one answer to a prompt"


def test_the_better_and_the_worse_policy_are_named() -> None:
    start = policy([(True, False)] * 20)
    better = policy([(True, True)] * 18 + [(True, False)] * 2)
    worse = policy([(False, False)] * 18 + [(True, False)] * 2)
    first, last = verdict_lines({"start": start, "worse": worse, "dpr": better})
    assert first.startswith("verdict: dpr answers more prompts right than start, +0.450 [")
    assert "paired t-test over 20 prompts, Holm, 2 policies" in first
    assert last.startswith("worse than start: worse, -0.450 [")


def test_no_policy_is_better_by_noise() -> None:
    start = policy([(True, False), (False, False)] * 10)
    other = policy([(False, False), (True, False)] * 9 + [(True, False)] * 2)
    (line,) = verdict_lines({"start": start, "dpr": other})
    assert line.startswith("verdict: no policy is surely better than start; the best is dpr, +0.025 [")


def test_without_enough_answers_or_policies_the_reason_is_given() -> None:
    few = policy([(True, False)] * 9)
    assert "9 held-out prompts have a known answer, but it needs 10" in next(verdict_lines({"a": few, "b": few}))
    assert "a is the only policy" in next(verdict_lines({"a": few}))
