"""What was computed of every response, one object each: to look at, and for the benchmarks' own programs."""

from collections.abc import Iterator, Mapping, Sequence

from dense_reward_trainer.benchmarks.prm_bench import JudgedSteps
from dense_reward_trainer.benchmarks.reward_bench_2 import Choice
from dense_reward_trainer.benchmarks.scored import ResponseScores, StepScores
from dense_reward_trainer.data.process_labels import Solution

Line = Mapping[str, object]


def step_lines(solutions: Sequence[Solution], scores: StepScores) -> Iterator[Line]:
    """ProcessBench's label (-1: all steps are right) and the values of the steps, by column and how."""
    for n, one in enumerate(solutions):
        label = -1 if one.first_wrong is None else one.first_wrong
        yield {"source": one.source, "label": label, "values": _at(scores, n)}


def prm_bench_lines(solutions: Sequence[JudgedSteps], scores: StepScores) -> Iterator[Line]:
    """The id that mr_eval gives a solution, its wrong steps counted from 0, and the values of the steps."""
    for n, one in enumerate(solutions):
        yield {"idx": one.id, "wrong_steps": sorted(one.wrong), "values": _at(scores, n)}


def reward_bench_2_lines(choices: Sequence[Choice], scores: ResponseScores) -> Iterator[Line]:
    """The columns that rewardbench reads (id, subset, num_correct), and the scores by column and aggregate."""
    for n, one in enumerate(choices):
        found = {column: {name: rows[n] for name, rows in by_name.items()} for column, by_name in scores.values.items()}
        yield {"id": one.id, "subset": one.subset, "num_correct": one.right, "scores": found}


def _at(scores: StepScores, n: int) -> dict[str, dict[str, list[float]]]:
    return {column: {how: rows[n] for how, rows in by_how.items()} for column, by_how in scores.values.items()}
