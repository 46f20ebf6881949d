"""Does a signal find the first wrong step of a solution that people have labelled? Must not know files or jobs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dense_reward_trainer.credit.error_localisation import (
    SIGNALS,
    Localisation,
    Located,
    offsets_of,
    signal_of,
    summarised,
)
from dense_reward_trainer.data.process_labels import Solution
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.reward_service import PinnedPair


def first_wrong_steps(pair: PinnedPair, solutions: Sequence[Solution], seed: int) -> dict[str, Localisation]:
    """By signal: the mean over the first wrong step's tokens against those of the right steps before it.

    Steps after it are in neither group: whether they are wrong is not known. Raises JobError where the service cannot
    score them, ConfigError where a step has no token.
    """
    located: dict[str, list[Located]] = {name: [] for name in SIGNALS}
    chats = [
        [{"role": "user", "content": one.problem}, {"role": "assistant", "content": one.text}] for one in solutions
    ]
    answers = tqdm(pair.ask_chats(chats, [*SIGNALS, "offsets"]), total=len(chats), desc="labelled solutions")
    for solution, scored in zip(solutions, answers, strict=True):
        step_T, known = steps_of(solution, offsets_of(scored)), range((solution.first_wrong or 0) + 1)
        if not set(known) <= set(step_T.tolist()):
            raise ConfigError(f"{solution.source}: a step ends in no token of its own: leave the solution out")
        for name in SIGNALS:
            values_T = signal_of(scored, name)
            means = [float(values_T[step_T == step].mean()) for step in known]
            located[name].append(Located(means[-1], np.array(means[:-1], dtype=np.float32)))
    return summarised(located, seed)


def steps_of(solution: Solution, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The step of every token, [T]: that in which its last character lies; an end of turn belongs to the last."""
    ends = np.array([end for _, end in solution.spans])
    places: NDArray[np.int64] = np.searchsorted(ends, [max(end - 1, 0) for _, end in offsets], side="right")
    return places.clip(max=len(ends) - 1)
