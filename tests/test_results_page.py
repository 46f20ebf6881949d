"""The tables of docs/results.md and docs/methods.md are those that their command writes from bench/results."""

from typing import cast

import pytest

from bench.results_page import (
    METHODS_PAGE,
    PAGE,
    Difference,
    OptionsStudy,
    fixed_point,
    methods_blocks,
    results_blocks,
    tokens,
    what_differs,
)
from bench.tables import block_of


@pytest.mark.parametrize("name", results_blocks())
def test_a_block_of_the_results_is_what_its_command_writes(name: str) -> None:
    assert block_of(PAGE, name) == results_blocks()[name].strip(), "run `python -m bench.results_page`"


@pytest.mark.parametrize("name", methods_blocks())
def test_a_block_of_the_methods_is_what_its_command_writes(name: str) -> None:
    assert block_of(METHODS_PAGE, name) == methods_blocks()[name].strip(), "run `python -m bench.results_page`"


def test_a_seed_that_never_closes_half_of_the_gap_has_no_median() -> None:
    assert tokens([1000.0, 2000.4, 30.0]) == "1,000"
    assert tokens([1000.0, None, 30.0]) == "never"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"baseline": "none"}, "the optimum"),
        ({"returns": "total", "kl_penalty": "reward"}, "the optimum"),
        ({"returns": "immediate"}, "π_sft (π_sft / π_ref)^2 at each token"),
        ({"signal": "sft_logprob"}, "π_sft^3"),
        ({"signal": "sft_logprob", "returns": "immediate"}, "π_sft^3 at each token"),
        ({"returns": "min"}, "the optimum of no objective"),
        ({"returns": "immediate", "kl_penalty": "loss_k2"}, "π_sft (π_sft / π_ref)^2 at each token"),
        ({"kl_penalty": "loss_k2", "baseline": "leave_one_out"}, "π_sft exp(2 Q), without later KL"),
    ],
)
def test_a_row_says_where_its_options_lead(options: dict[str, object], expected: str) -> None:
    assert fixed_point(options, 0.5) == expected


def test_only_differences_that_stand_after_the_correction_are_claimed() -> None:
    differences = {
        name: {"interval": {"value": value, "low": 0.0, "high": 0.0}, "p_holm": p}
        for name, value, p in (("a", 0.1, 0.01), ("b", 0.2, 0.06), ("c", -0.1, 0.049))
    }
    study: OptionsStudy = {
        "config": {"control": "plain", "compared": [], "kl_coefficient": 0.5, "estimators": {}},
        "outcomes": {},
        "differences": cast("dict[str, Difference]", differences),
    }
    assert what_differs(study) == "After the correction, at 5 %: `a` above `plain`; `c` below it."
