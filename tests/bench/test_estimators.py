"""Figures of `make estimators`: ratios within a seed, at chosen and at fastest rates, and paired differences."""

import pytest

from bench.estimators import OutcomeJson, difference_keys, fastest_key, gap_keys


def outcome(gaps: list[float], tokens: list[float | None]) -> OutcomeJson:
    return {"gap_closed": gaps, "tokens_to_half": tokens}


def test_the_ratio_of_tokens_is_the_geometric_mean_of_ratios_within_a_seed() -> None:
    outcomes = {"plain": outcome([0.8, 0.9], [100.0, 900.0]), "tuned": outcome([0.9, 1.0], [100.0, 225.0])}
    keys = gap_keys(outcomes)
    assert keys["sample_ratio_to_half_gap"] == pytest.approx(2.0)
    low, high = keys["sample_ratio_to_half_gap_ci_low"], keys["sample_ratio_to_half_gap_ci_high"]
    assert low is not None
    assert high is not None
    assert 0 < low < 1 < high
    assert low * high == pytest.approx(4.0)
    assert keys["gap_closed_paper"] == pytest.approx(0.85)
    assert keys["gap_closed_best"] == pytest.approx(0.95)


def test_no_ratio_is_claimed_where_a_seed_did_not_reach_half() -> None:
    outcomes = {"plain": outcome([0.4, 0.9], [None, 900.0]), "tuned": outcome([0.9, 1.0], [100.0, 300.0])}
    assert gap_keys(outcomes)["sample_ratio_to_half_gap"] is None
    assert gap_keys(outcomes)["sample_ratio_to_half_gap_ci_low"] is None


def test_the_difference_is_that_of_the_tuned_option_with_its_corrected_p_value() -> None:
    keys = difference_keys({"tuned": {"interval": {"value": 0.03, "low": 0.01, "high": 0.05}, "p_holm": 0.04}})
    assert keys == {
        "gap_closed_tuned_minus_plain": 0.03,
        "gap_closed_tuned_minus_plain_ci_low": 0.01,
        "gap_closed_tuned_minus_plain_ci_high": 0.05,
        "gap_closed_tuned_minus_plain_p_holm": 0.04,
    }


def test_the_fastest_rates_are_each_estimators_own() -> None:
    tuning: dict[str, dict[str, dict[str, float | None]]] = {
        "plain": {"0.1": {"tokens_to_half": 500.0}, "0.01": {"tokens_to_half": 2000.0}},
        "tuned": {"0.1": {"tokens_to_half": None}, "0.01": {"tokens_to_half": 100.0}},
    }
    assert fastest_key(tuning) == {"sample_ratio_to_half_gap_fastest_rates": 5.0}
    assert fastest_key(tuning | {"tuned": {}}) == {"sample_ratio_to_half_gap_fastest_rates": None}
