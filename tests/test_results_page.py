"""The tables of docs/results.md are those that its command writes from bench/results."""

import pytest

from bench.results_page import PAGE, blocks, tokens
from bench.tables import block_of


@pytest.mark.parametrize("name", blocks())
def test_a_block_of_the_page_is_what_its_command_writes(name: str) -> None:
    assert block_of(PAGE, name) == blocks()[name].strip(), "run `python -m bench.results_page`"


def test_a_seed_that_never_closes_half_of_the_gap_has_no_median() -> None:
    assert tokens([1000.0, 2000.4, 30.0]) == "1,000"
    assert tokens([1000.0, None, 30.0]) == "never"
