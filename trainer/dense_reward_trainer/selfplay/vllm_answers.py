"""Answers by vLLM, in a process of their own. Imports vllm only when the first chunk arrives."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from dense_reward.records import IdArray

from dense_reward_trainer.configs.irft import GenerationOptions
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.sampling import cut_at_end_of_turn

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


class Completion(Protocol):
    """What vLLM returns of one answer."""

    token_ids: Sequence[int]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class VllmTask:
    """A chunk of prompts, and the checkpoint's files that answer it."""

    files: Path
    dtype: str
    options: GenerationOptions
    end_of_turn_id: int
    vocab_size: int
    limit_tokens: int
    prompts: tuple[IdArray, ...]
    seed: int


def vllm_answers(task: VllmTask) -> list[Rollout]:
    """One answer to each prompt, in order. Raises JobError if vLLM samples an id that the tokenizer does not have."""
    engine = _engine(task.files, task.dtype, task.limit_tokens)
    parameters = [_parameters(task, i) for i in range(len(task.prompts))]
    prompts = [{"prompt_token_ids": prompt.tolist()} for prompt in task.prompts]
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    return [rollout_of(task, prompt, output.outputs[0]) for prompt, output in zip(task.prompts, outputs, strict=True)]


def rollout_of(task: VllmTask, prompt_P: IdArray, completion: Completion) -> Rollout:
    """The answer that vLLM gave, up to and including its end of turn."""
    ids_T = np.array(completion.token_ids, dtype=np.int32)
    response_T, finished = cut_at_end_of_turn(ids_T, task.end_of_turn_id)
    if not finished and (completion.finish_reason != "length" or len(ids_T) < task.options.max_new_tokens):
        raise JobError(
            f"vLLM stopped an answer after {len(ids_T)} tokens without the end of turn ({completion.finish_reason}): "
            "set generation.engine=transformers"
        )
    if len(response_T) and int(response_T.max()) >= task.vocab_size:
        raise JobError(
            f"vLLM sampled the id {int(response_T.max())}, but the tokenizer has only {task.vocab_size} ids: set "
            "generation.engine=transformers, which never samples such ids"
        )
    return Rollout(prompt_P, response_T, finished)


def _parameters(task: VllmTask, i: int) -> "SamplingParams":
    """The model's own distribution at a temperature; a seed for each prompt."""
    from vllm import SamplingParams  # noqa: PLC0415 - an optional library

    options = task.options
    return SamplingParams(
        max_tokens=options.max_new_tokens,
        temperature=0.0 if options.greedy else options.temperature,
        top_p=options.top_p,
        top_k=0,
        stop_token_ids=[task.end_of_turn_id],
        # other ends of text in the checkpoint's files must not stop an answer
        ignore_eos=True,
        detokenize=False,
        seed=(task.seed + i) % 2**32,
    )


@cache
def _engine(files: Path, dtype: str, limit_tokens: int) -> "LLM":
    from vllm import LLM  # noqa: PLC0415 - an optional library

    return LLM(
        model=str(files),
        dtype=dtype,
        generation_config="vllm",  # not the checkpoint's own settings, such as a top-k
        max_model_len=limit_tokens,
        enable_prefix_caching=False,
    )
