"""Does a signal find the first wrong step of a solution? People labelled the steps."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dense_reward_trainer.credit.error_localisation import ErrorScores, Localisation, offsets_of, summarise
from dense_reward_trainer.credit.references import References
from dense_reward_trainer.data.process_labels import Solution
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.runs.progress import Progress


def first_wrong_steps(references: References, solutions: Sequence[Solution], seed: int) -> dict[str, Localisation]:
    """How each column, as the mean over a step's tokens, finds the first wrong step among the right ones before it.

    Steps after it are in neither group, because their labels are unknown. Raises JobError if the service cannot score a
    solution, ConfigError if a step has no token.
    """
    scores: dict[str, list[ErrorScores]] = {column: [] for column in references.columns}
    chats = [
        [{"role": "user", "content": one.problem}, {"role": "assistant", "content": one.text}] for one in solutions
    ]
    progress = Progress(len(chats), "labelled solutions")
    answers = progress.each(references.score_chats(chats, ["offsets"]), lambda answer: answer.scored.length)
    for solution, answer in zip(solutions, answers, strict=True):
        step_T, known = steps_of(solution, offsets_of(answer.scored)), range((solution.first_wrong or 0) + 1)
        if not set(known) <= set(step_T.tolist()):
            raise ConfigError(
                f"{solution.source}: a step shares all its tokens with the next one: remove the solution from the file"
            )
        for column, values_T in answer.signals.items():
            means = [float(values_T[step_T == step].mean()) for step in known]
            scores[column].append(ErrorScores(means[-1], np.array(means[:-1], dtype=np.float32)))
    return summarise(scores, seed)


def steps_of(solution: Solution, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The step of every token, [T]: the step that holds its last character; an end of turn belongs to the last step."""
    ends = np.array([end for _, end in solution.spans])
    places: NDArray[np.int64] = np.searchsorted(ends, [max(end - 1, 0) for _, end in offsets], side="right")
    return places.clip(max=len(ends) - 1)
