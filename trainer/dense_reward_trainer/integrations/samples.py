"""Samples of slime and miles, of all prompts of a step -> an advantage for every token.

Both programs have the same Sample and the same hook for it, and read settings of their users from a YAML file
(`--custom-config-path`); `dense_reward` in it has the options of DenseRewardOptions. Imports neither program.
"""

from collections.abc import Sequence
from enum import Enum
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from dense_reward.client.tokenizer import CallersTokenizer
from dense_reward.records import FloatArray
from pydantic import ValidationError
from transformers import AutoTokenizer

from dense_reward_trainer.configs.dense_reward import DenseRewardOptions
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.integrations.connection import rewards_of
from dense_reward_trainer.rl.advantages import action_advantages, make_batch
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.returns import pad


class Sample(Protocol):
    """What is read of a sample. `tokens`: prompt and response; the last `response_length` are the response."""

    tokens: list[int]
    response_length: int
    group_index: int | None
    rollout_id: int | None
    loss_mask: list[int] | None
    rollout_log_probs: list[float] | None
    status: Enum

    def get_reward_value(self, args: Any) -> float: ...  # noqa: ANN401 - a Namespace of the program


def options_of(settings: object) -> DenseRewardOptions:
    """The options in `dense_reward` of the program's settings; the defaults without it. Raises ConfigError."""
    given = getattr(settings, "dense_reward", None) or {}
    try:
        return DenseRewardOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(["dense_reward", *(str(part) for part in first["loc"])])
        raise ConfigError(f"{where}: {first['msg']} (--custom-config-path)") from None


def advantages(settings: Any, samples: Sequence[Sample]) -> list[FloatArray]:  # noqa: ANN401 - a Namespace
    """The advantage of each token of each response, [T] float32 in nats, in the order of the samples.

    Raises ConfigError for samples whose advantages would not be what they are called, JobError if the service fails.
    """
    options = options_of(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.hf_checkpoint)
    order = sorted(range(len(samples)), key=lambda index: _group(samples[index]))
    found = _of_groups([samples[index] for index in order], options, settings.rollout_temperature, tokenizer)
    return [advantage_T for _, advantage_T in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def _of_groups(
    samples: Sequence[Sample], options: DenseRewardOptions, temperature: float, tokenizer: CallersTokenizer
) -> list[FloatArray]:
    options = options.model_copy(update={"group_size": _checked_group_size(samples, options)})
    rollouts = [_rollout(sample) for sample in samples]
    logprobs = [_logprobs(sample, options, temperature) for sample in samples]
    with_kl = options.baseline == "kl"
    rewards = rewards_of(options.service_url, options, tokenizer, signal=options.signal, with_kl=with_kl)
    ids_BT = pad([rollout.response_T for rollout in rollouts], torch.long)
    batch = make_batch(rollouts, ids_BT[..., None], pad(logprobs)[..., None], rewards.score(rollouts))
    advantage_BT = action_advantages(batch, options, options.kl_coefficient).advantage_BTM[..., 0].float()
    return [row[: len(rollout.response_T)].numpy() for row, rollout in zip(advantage_BT, rollouts, strict=True)]


def _group(sample: Sample) -> int:
    if sample.group_index is None:
        raise ConfigError("a sample has no group_index, so its group is unknown: set it")
    return sample.group_index


def _checked_group_size(samples: Sequence[Sample], options: DenseRewardOptions) -> int:
    """How many samples each group has. Raises ConfigError if that differs, or the groups are not what they seem."""
    groups = [list(group) for _, group in groupby(samples, key=_group)]
    sizes = {len(group) for group in groups}
    if len(sizes) != 1:
        raise ConfigError(f"groups have different sizes {sorted(sizes)}: let filters drop whole groups only")
    size = sizes.pop()
    if size < 2 and options.baseline == "leave_one_out":
        raise ConfigError("a prompt has one answer, so there is nothing to compare it with: raise n-samples-per-prompt")
    if any(len({tuple(_prompt(sample)) for sample in group}) > 1 for group in groups):
        raise ConfigError("a group has several prompts: give all its samples the same prompt")
    rollouts = [sample.rollout_id for sample in samples if sample.rollout_id is not None]
    if len(set(rollouts)) < len(rollouts):
        raise ConfigError("a rollout has several samples: make one sample of each rollout")
    return size


def _prompt(sample: Sample) -> list[int]:
    return sample.tokens[: len(sample.tokens) - sample.response_length]


def _rollout(sample: Sample) -> Rollout:
    if sample.loss_mask is not None and not all(sample.loss_mask):
        raise ConfigError(
            "a loss_mask has zeros: tokens that the policy did not write would be rewarded. Turn off tools and "
            "partial rollouts"
        )
    prompt = _prompt(sample)
    ids = np.array(sample.tokens, dtype=np.int32)
    return Rollout(ids[: len(prompt)], ids[len(prompt) :], sample.status.value == "completed")


def _logprobs(sample: Sample, options: DenseRewardOptions, temperature: float) -> FloatArray:
    """The policy's log-prob of each token, for the KL penalty; 0 if there is none."""
    if options.kl_coefficient == 0:
        return np.zeros(sample.response_length, dtype=np.float32)
    cure = "or set kl_coefficient of dense_reward to 0 and use the program's own KL"
    if temperature != 1:
        raise ConfigError(f"the KL penalty needs log-probs at temperature 1: set rollout-temperature to 1, {cure}")
    if sample.rollout_log_probs is None or len(sample.rollout_log_probs) != sample.response_length:
        raise ConfigError(f"the KL penalty needs rollout_log_probs, which a sample lacks: return them, {cure}")
    return np.array(sample.rollout_log_probs, dtype=np.float32)
