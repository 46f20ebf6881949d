"""Figures of `make estimators`: ratios within a seed, at the chosen and at the fastest rates, and gains."""

import pytest

from bench.estimators import fastest_key, gain_keys, gap_keys


def outcome(gaps: list[float | None], tokens: list[float | None]) -> dict[str, list[float | None]]:
    return {"gap_closed": gaps, "tokens_to_half": tokens}


def test_the_ratio_of_tokens_is_the_median_of_ratios_within_a_seed() -> None:
    outcomes = {"paper": outcome([0.8, 0.9], [100.0, 900.0]), "best": outcome([0.9, 1.0], [100.0, 300.0])}
    keys = gap_keys(outcomes)
    assert keys["sample_ratio_to_half_gap"] == 2.0
    assert keys["gap_closed_paper"] == pytest.approx(0.85)
    assert keys["gap_closed_best"] == pytest.approx(0.95)


def test_no_ratio_is_claimed_where_a_seed_did_not_reach_half() -> None:
    outcomes = {"paper": outcome([0.4, 0.9], [None, 900.0]), "best": outcome([0.9, 1.0], [100.0, 300.0])}
    assert gap_keys(outcomes)["sample_ratio_to_half_gap"] is None


def test_the_fastest_rates_are_each_estimators_own() -> None:
    tuning: dict[str, dict[str, dict[str, float | None]]] = {
        "paper": {"0.1": {"tokens_to_half": 500.0}, "0.01": {"tokens_to_half": 2000.0}},
        "best": {"0.1": {"tokens_to_half": None}, "0.01": {"tokens_to_half": 100.0}},
    }
    assert fastest_key(tuning) == {"sample_ratio_to_half_gap_fastest_rates": 5.0}
    assert fastest_key(tuning | {"best": {}}) == {"sample_ratio_to_half_gap_fastest_rates": None}


def test_a_gain_comes_with_its_lower_end_and_the_drift_of_length() -> None:
    columns = {
        "sft": {"length_tokens": {"value": 50.0}},
        "dpr": {
            "sampled_accuracy_gain": {"value": 0.2, "low": 0.15, "high": 0.25},
            "length_tokens_gain": {"value": -1.0, "low": -2.0, "high": 0.0},
        },
    }
    keys = gain_keys(columns, "dpr")
    assert keys == {"sampled_accuracy_gain": 0.2, "sampled_accuracy_gain_ci_low": 0.15, "length_drift": -0.02}
