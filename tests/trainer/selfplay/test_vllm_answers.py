"""What vLLM returns becomes an answer of exact ids, or is refused. vLLM itself is not needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from dense_reward_trainer.configs.irft import GenerationOptions
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.selfplay.vllm_answers import VllmTask, rollout_of

END = 3
TASK = VllmTask(Path("unused"), "float32", GenerationOptions(max_new_tokens=4), END, 100, 50, (), 0)
PROMPT = np.array([1], dtype=np.int32)


@dataclass
class Answer:
    token_ids: Sequence[int]
    finish_reason: str | None


@pytest.mark.parametrize(
    ("ids", "reason", "finished"),
    [
        ([7, 8, END], "stop", True),
        ([END], "stop", True),
        ([7, 8, 9, 6], "length", False),
        ([7, 8, 9, END], "length", True),
    ],
)
def test_an_answer_ends_its_turn_or_was_cut_off(ids: list[int], reason: str, finished: bool) -> None:
    rollout = rollout_of(TASK, PROMPT, Answer(ids, reason))
    assert (rollout.response_T.tolist(), rollout.finished) == (ids, finished)


@pytest.mark.parametrize(
    ("ids", "reason", "message"),
    [
        ([7, 8], "stop", "stopped an answer after 2 tokens without the end of turn"),
        ([7, 8], "abort", "stopped an answer"),
        ([7, 8], "length", "stopped an answer"),
        ([7, 100, END], "stop", "sampled the id 100, but the tokenizer has only 100 ids"),
    ],
)
def test_another_end_and_unknown_ids_are_refused(ids: list[int], reason: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        rollout_of(TASK, PROMPT, Answer(ids, reason))
