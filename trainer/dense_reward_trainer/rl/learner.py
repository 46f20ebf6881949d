"""A policy that learns from token rewards. One `step`: sample a batch, score it, estimate advantages, update.

Rewards come from any TokenRewards: a service in a job, a table in a study.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypedDict

import numpy as np
import torch
from dense_reward.records import IdArray
from torch import Tensor
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.advantages import Actions, Batch, action_advantages, make_batch, shaped_rewards
from dense_reward_trainer.rl.batch_metrics import describe
from dense_reward_trainer.rl.losses import divisor, kl_loss, policy_gradient
from dense_reward_trainer.rl.optimiser import learning_rate, make_optimiser, set_learning_rate
from dense_reward_trainer.rl.policy import Policy, action_logprobs, likeliest_actions, microbatches
from dense_reward_trainer.rl.prompts import prompts_of_step
from dense_reward_trainer.rl.records import TokenRewards
from dense_reward_trainer.rl.sampling import Sampling, sample
from dense_reward_trainer.runs.timer import Timer

KL_ERROR_LIMIT = 0.2  # limit of the relative error of the KL, from Ziegler et al.


class LearnerState(TypedDict):
    """The state of a learner after a step, as plain values and tensors."""

    model: dict[str, Tensor]
    optimiser: dict[str, Any]
    kl_coefficient: float
    average: dict[str, Any] | None


@dataclass(slots=True, eq=False)
class Learner:
    """A policy in training. Every field except `config` changes from step to step."""

    config: DprConfig
    policy: Policy
    optimiser: AdamW
    kl_coefficient: float
    average: AveragedModel | None

    @classmethod
    def of(cls, config: DprConfig, policy: Policy) -> Self:
        """A learner before its first step."""
        average = None
        if config.average_decay is not None:
            average = AveragedModel(policy.model, avg_fn=partial(moving_average, config.average_decay))
            average.update_parameters(policy.model)  # the first call copies the weights
        return cls(config, policy, make_optimiser(config, policy.model), config.kl_coefficient, average)

    @property
    def result(self) -> Policy:
        """The policy to measure and write: with averaged weights if `average_decay` is set."""
        if self.average is None:
            return self.policy
        model: PreTrainedModel = self.average.module
        return replace(self.policy, model=model)

    def step(self, step: int, prompts: Sequence[IdArray], rewards: TokenRewards) -> dict[str, float]:
        """Learn from fresh samples of the current policy; step 1, 2, ... Returns the metrics of the step.

        Raises JobError if a gradient is not finite; its optimiser step is then not taken.
        """
        config, clock = self.config, Timer()
        batch = self.sample_batch(step, prompts, rewards, clock)
        set_learning_rate(self.optimiser, learning_rate(config, step))
        updated = self.update(batch, action_advantages(batch, config, self.kl_coefficient))
        clock.lap("update_s")

        metrics = describe(batch, shaped_rewards(batch, config, self.kl_coefficient))
        metrics["kl_coefficient"] = self.kl_coefficient
        metrics["learning_rate"] = learning_rate(config, step)
        metrics["computed_tokens"] = float(sum(len(r.prompt_P) + len(r.response_T) for r in batch.rollouts))
        metrics["scored_tokens"] = float(batch.mask_BT.sum()) * (1 + batch.candidate_count)
        if self.average is not None:
            self.average.update_parameters(self.policy.model)
        if config.kl_target is not None:
            self.kl_coefficient *= kl_factor(metrics["kl_to_sft"], config.kl_target, config.kl_adaptation)
        return metrics | updated | clock.report(int(batch.mask_BT.sum()))

    def sample_batch(self, step: int, prompts: Sequence[IdArray], rewards: TokenRewards, clock: Timer) -> Batch:
        """Fresh samples of the current policy, scored; the same for the same step, prompts and weights."""
        config = self.config
        chosen = prompts_of_step(prompts, step, config.prompts_per_step, config.seed)
        rollouts = sample(self.policy, chosen, sampling_of(config), seed_of(config.seed, step))
        clock.lap("rollout_s")
        repeated, responses = [r.prompt_P for r in rollouts], [r.response_T for r in rollouts]
        ids_BTM, logprob_BTM = likeliest_actions(
            self.policy, repeated, responses, config.candidates, config.microbatch_tokens
        )
        candidates = None
        if config.candidates:
            candidates = [ids_TM[: len(ids), 1:].numpy() for ids_TM, ids in zip(ids_BTM, responses, strict=True)]
        clock.lap("logprob_s")
        scored = rewards.score(rollouts, candidates)
        clock.lap("score_s")
        return make_batch(rollouts, ids_BTM, logprob_BTM, scored)

    def gradient(self, batch: Batch) -> Tensor:
        """Gradient of the loss on a batch of the current policy: all weights in one row, float32, on the CPU."""
        actions = action_advantages(batch, self.config, self.kl_coefficient)
        self.optimiser.zero_grad(set_to_none=True)
        self._backward(batch, actions, self._zero_logprobs(actions), first=True)
        return flat_gradient(self.policy.model)

    def update(self, batch: Batch, actions: Actions) -> dict[str, float]:
        """Take `updates_per_batch` optimiser steps on a batch; return loss and unclipped gradient norm of the last one.

        In the first step the policy is still the one that sampled. Its log-probs are kept for the ratios of later
        steps.
        """
        old_BTM = self._zero_logprobs(actions)
        loss = norm = 0.0
        for index in range(self.config.updates_per_batch):
            self.optimiser.zero_grad(set_to_none=True)
            loss = self._backward(batch, actions, old_BTM, first=index == 0)
            parameters = self.policy.model.parameters()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
            if not math.isfinite(norm):
                raise JobError(
                    f"the gradient's norm is {norm}: training has diverged; start in another output_dir with a lower "
                    "learning_rate or a higher kl_coefficient"
                )
            self.optimiser.step()
        return {"loss": loss, "grad_norm": norm}

    def _zero_logprobs(self, actions: Actions) -> Tensor:
        """Zeros, [B, T, M], that the first `_backward` replaces by the log-probs of the policy that sampled."""
        return torch.zeros(actions.ids_BTM.shape, dtype=torch.promote_types(self.policy.model.dtype, torch.float32))

    def _backward(self, batch: Batch, actions: Actions, old_BTM: Tensor, *, first: bool) -> float:
        """Accumulates the gradient of the loss on the whole batch over microbatches; returns the loss.

        If `first`, writes the policy's log-probs into `old_BTM` before they are used: all ratios are then 1.
        """
        config, policy = self.config, self.policy
        over = divisor(batch.mask_BT, config.normalise)
        lengths = [len(rollout.prompt_P) + len(rollout.response_T) for rollout in batch.rollouts]
        loss = 0.0
        for rows in microbatches(lengths, config.microbatch_tokens):
            chosen = [batch.rollouts[b] for b in rows]
            part = (rows, slice(max(len(rollout.response_T) for rollout in chosen)))
            logprob_btm = action_logprobs(
                policy,
                [r.prompt_P for r in chosen],
                [r.response_T for r in chosen],
                actions.ids_BTM[part],
                config.temperature,
            )
            if first:
                old_BTM[part] = logprob_btm.detach().cpu()
            tensors = old_BTM, actions.advantage_BTM, actions.weight_BTM
            on_device = [tensor[part].to(policy.device) for tensor in tensors]
            clip = config.ratio_clip if config.updates_per_batch > 1 else None
            part_loss = policy_gradient(logprob_btm, *on_device, over=over, clip=clip)
            if config.kl_penalty != "reward":
                rest = [t[part].to(policy.device) for t in (old_BTM[..., 0], batch.sft_logprob_BT, batch.mask_BT)]
                penalty = kl_loss(config.kl_penalty, logprob_btm[..., 0], *rest, over=over)
                part_loss = part_loss + self.kl_coefficient * penalty
            torch.autograd.backward(part_loss)
            loss += float(part_loss.detach())
        return loss

    def state(self) -> LearnerState:
        """Everything that a later process needs to resume from here."""
        return {
            "model": self.policy.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "kl_coefficient": self.kl_coefficient,
            "average": None if self.average is None else self.average.state_dict(),
        }

    def restore(self, state: LearnerState) -> None:
        """Resume from a `state`."""
        self.policy.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.kl_coefficient = state["kl_coefficient"]
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])


def flat_gradient(model: PreTrainedModel) -> Tensor:
    """The gradients of all weights in one row, float32, on the CPU; 0 for a weight that has none."""
    rows = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    return torch.cat([row.flatten().float().cpu() for row in rows])


def sampling_of(config: DprConfig) -> Sampling:
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        group_size=config.group_size,
        temperature=config.temperature,
        batch_size=config.rollout_batch_size,
    )


def seed_of(seed: int, step: int) -> int:
    """The seed of one step's samples: a resumed run draws the same samples as an unbroken one."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def moving_average(decay: float, averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    """The next value of an exponential moving average; it decays faster at first, so that it forgets the start."""
    return torch.lerp(averaged, current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))


def kl_factor(kl: float, target: float, speed: float) -> float:
    """The factor by which the KL coefficient changes after a step (Ziegler et al., arXiv 1909.08593, section 2.2)."""
    error = min(max(kl / target - 1, -KL_ERROR_LIMIT), KL_ERROR_LIMIT)
    return 1 + speed * error
