"""Which tokens are a step's, and what becomes of their signals."""

import numpy as np
import pytest
from dense_reward_trainer.benchmarks.scored import step_values, tokens_of_steps
from dense_reward_trainer.data.process_labels import Solution


def test_a_token_belongs_to_the_step_it_ends_in_and_a_step_without_one_takes_what_covers_it() -> None:
    solution = Solution("P", ("ab", "c", "def"), None, "here:1", separator="\n")  # ab\nc\ndef
    one_by_one = [*((i, i + 1) for i in range(8)), (8, 8)]
    assert tokens_of_steps(solution, one_by_one) == [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    covering = [(0, 2), (2, 6), (6, 8), (8, 8)]  # one token holds the end of the first step and the second whole
    assert tokens_of_steps(solution, covering) == [[0], [1], [1, 2, 3]]


def test_a_step_is_as_good_as_its_tokens_on_average_or_as_its_worst_one() -> None:
    values = np.array([-1.0, -3.0, 0.0], dtype=np.float32)
    assert step_values(values, [[0, 1], [2]], "mean") == pytest.approx([-2.0, 0.0])
    assert step_values(values, [[0, 1], [2]], "min") == pytest.approx([-3.0, 0.0])
