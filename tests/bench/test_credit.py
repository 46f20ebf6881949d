"""The credit benchmark: medians over the training seeds, and the tables of the page."""

from typing import cast

from bench.credit import CreditJson, Medians, medians
from bench.results_page import CreditFile, by_aggregate, cells, located, samples


def auroc(value: float) -> dict[str, dict[str, float]]:
    return {"auroc": {"value": value, "low": 0.0, "high": 1.0}}


def result(value: float) -> CreditJson:
    found = {
        "localisation": {"digit": {"sft_logprob": auroc(value)}},
        "planted_ranking": {"digit": {"sft_logprob": {"sum": auroc(value / 2)}}},
        "ranking": {"sft_logprob": {"sum": auroc(value / 4), "min": auroc(value / 8)}},
        "commits": {},
    }
    return cast(CreditJson, found)


def test_the_median_over_seeds_is_taken_of_each_column_and_aggregate() -> None:
    assert medians([result(0.8), result(0.2), result(0.4)]) == {
        "localisation": {"digit": {"sft_logprob": 0.4}},
        "ranking": {
            "digit": {"sft_logprob": {"sum": 0.2}},
            "samples": {"sft_logprob": {"sum": 0.1, "min": 0.05}},
        },
    }


def test_without_a_policy_only_planted_errors_are_ranked() -> None:
    one = result(0.8)
    one["ranking"] = None
    assert list(medians([one])["ranking"]) == ["digit"]


def test_a_row_of_the_page_has_the_columns_in_order_and_counts_its_samples() -> None:
    found: Medians = medians([result(0.8)])
    seeds = {"0": {"right": 7, "wrong": 3}, "1": {"right": 5, "wrong": 4}}
    file = cast(CreditFile, {"medians": found, "seeds": seeds})
    assert cells(located(file)["digit"], ["sft_logprob"]) == ["0.800"]
    assert by_aggregate(file, "samples", "min") == {"sft_logprob": 0.1}
    assert samples(file) == "5 to 7 right against 3 to 4 wrong"
