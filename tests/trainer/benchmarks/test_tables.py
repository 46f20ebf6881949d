"""Tables of the benchmarks: the control, differences to it, and the rows of RewardBench 2."""

import numpy as np
import pytest
from dense_reward_trainer.benchmarks.reward_bench_2 import Choice
from dense_reward_trainer.benchmarks.scored import ResponseScores, StepScores
from dense_reward_trainer.benchmarks.tables import Method, first_error_tables, reward_bench_2_table
from dense_reward_trainer.data.process_labels import Solution


def steps(found: float, count: int = 60) -> tuple[list[Solution], list[list[float]]]:
    """Solutions of three steps, every other one with an error in the second, which a signal finds in a share."""
    rng = np.random.default_rng(0)
    solutions, values = [], []
    for n in range(count):
        wrong = n % 2 == 1
        solutions.append(Solution(f"P{n}", ("a", "b", "c"), 1 if wrong else None, f"here:{n}"))
        values.append([0.0, -2.0 if wrong and rng.random() < found else 0.0, 0.0])
    return solutions, values


def test_a_signal_of_a_reference_is_compared_with_the_best_one_of_the_sft_model_alone() -> None:
    solutions, weak = steps(0.3)
    _, strong = steps(0.9)
    both = {"sft_logprob": weak, "margin": [[0.0] * 3] * 60, "reward:half": strong, "centred:half": weak}
    scores = StepScores({column: {"mean": rows, "min": rows} for column, rows in both.items()})
    (table,) = first_error_tables({"own": (solutions, scores)}, None, seed=0)
    assert table.control == Method("sft_logprob", "mean", "first_drop")
    rows = {row.method: row for row in table.rows}
    assert rows[table.control].against_control is None
    better = rows[Method("reward:half", "min", "first_drop")].against_control
    same = rows[Method("centred:half", "mean", "first_drop")].against_control
    assert better is not None
    assert better.low > 0
    assert same is not None
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_average_of_splits_is_that_of_their_metrics() -> None:
    solutions, values = steps(0.5)
    scores = StepScores({"sft_logprob": {"mean": values, "min": values}})
    tables = first_error_tables({"a": (solutions, scores), "b": (solutions[:40], _first(scores, 40))}, "a", seed=0)
    first, second, average = (table.rows[0] for table in tables)
    assert average.metric.value == pytest.approx((first.metric.value + second.metric.value) / 2)
    assert first.thresholds == second.thresholds
    assert tables[2].count == 100


def _first(scores: StepScores, count: int) -> StepScores:
    return StepScores(
        {column: {how: rows[:count] for how, rows in by_how.items()} for column, by_how in scores.values.items()}
    )


def test_reward_bench_2_is_the_mean_over_its_subsets_and_a_prompt_that_is_too_long_is_a_miss() -> None:
    def choice(subset: str, n: int) -> Choice:
        return Choice(str(n), subset, "P", ("a", "b"), 1, f"here:{n}")

    choices = [choice("Math", 0), choice("Math", 1), choice("Focus", 2)]
    rows = [[1.0, 0.0], [], [0.0, 0.0]]
    by_name = {"sum": rows, "mean": rows, "min": rows, "window_min": rows}
    table = reward_bench_2_table(choices, ResponseScores({"reward:half": by_name}, too_long=1), seed=0)  # type: ignore[dict-item]
    assert table.control is None
    assert table.rows[0].parts == {"Math": 0.5, "Focus": 0.5}
    assert table.rows[0].metric.value == 0.5
    assert (table.count, table.too_long) == (3, 1)
