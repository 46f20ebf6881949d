"""Shares of right answers: paired comparisons, weights within a prompt, and values without spread."""

from math import log

import pytest
from dense_reward_trainer.preview.gains import SFT, Tilted, compare_policies, likeliest, reweighted, several, spread_of
from scipy.stats import ttest_rel

SFT_SHARE, GREEDY, TILTED, OTHER = [0.25, 0.5, 0.0, 0.75], [0.0, 1.0, 0.0, 1.0], [0.75, 1.0, 0.5, 0.75], [0.5] * 4


def test_policies_are_compared_within_every_prompt() -> None:
    found = compare_policies("sampled", {SFT: SFT_SHARE, "greedy": GREEDY}, {"base": Tilted(TILTED, greedy=GREEDY)})
    assert found.prompts == 4
    assert {name: one.value for name, one in found.free.items()} == {SFT: 0.375, "greedy": 0.5}
    base = found.tilted["base"]
    over = base.over[SFT]
    assert over.interval.value == 0.375
    assert over.p == pytest.approx(ttest_rel(TILTED, SFT_SHARE).pvalue)
    assert base.p == pytest.approx(max(ttest_rel(TILTED, SFT_SHARE).pvalue, ttest_rel(TILTED, GREEDY).pvalue))
    assert found.free_over_sft["greedy"].interval.value == 0.125
    assert base.greedy is not None
    assert base.greedy.value == 0.5


def test_p_values_count_the_references() -> None:
    free = {SFT: SFT_SHARE}
    alone = compare_policies("sampled", free, {"base": Tilted(TILTED)}).tilted["base"]
    two = compare_policies("sampled", free, {"base": Tilted(TILTED), "early": Tilted(OTHER)}).tilted["base"]
    assert two.p == pytest.approx(2 * alone.p)
    assert two.over[SFT].p == alone.over[SFT].p


def test_values_without_spread_leave_room_for_prompts_that_were_not_seen() -> None:
    found = spread_of([1.0] * 50, low=0.0)
    assert (found.value, found.high) == (1.0, 1.0)
    # if 5.8 % of all prompts were otherwise, 50 prompts would show none of them in 5 of 100 cases
    assert (found.low) ** 50 == pytest.approx(0.05)
    assert spread_of([0.0] * 10, low=-1.0).low == pytest.approx(-spread_of([0.0] * 10, low=-1.0).high)


def test_weights_are_normalised_within_each_prompt_that_has_several_answers() -> None:
    right, prompt = [True, False, False, True, True], [7, 3, 7, 3, 5]
    found = reweighted([log(3.0), 50.0, 0.0, 50.0, -9.0], right, prompt)
    assert found.share == pytest.approx([0.5, 0.75])
    assert found.effective_samples == pytest.approx((2 + 16 / 10) / 2)
    assert several(prompt) == [[1, 3], [0, 2]]


def test_large_log_weights_do_not_overflow_and_choose_one_answer() -> None:
    found = reweighted([2000.0, 0.0, -2000.0], [True, False, False], [0, 0, 0])
    assert found.share == [1.0]
    assert found.effective_samples == pytest.approx(1.0)


def test_the_likeliest_answers_of_a_prompt_count_in_part_if_they_are_equal() -> None:
    assert likeliest([1.0, 1.0, 0.0, 5.0], [True, False, True, True], [0, 0, 0, 1]) == [0.5]
