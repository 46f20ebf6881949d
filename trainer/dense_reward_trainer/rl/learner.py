"""A policy that learns from token rewards: sample, score, estimate, update. One `step` is one batch of samples.

Must not know files, services or held-out prompts; where rewards come from is a TokenRewards.
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
from dense_reward_trainer.rl.advantages import Actions, Batch, actions, assemble, shaped_rewards
from dense_reward_trainer.rl.losses import divisor, kl_loss, policy_gradient
from dense_reward_trainer.rl.optimiser import learning_rate, make_optimiser, set_learning_rate
from dense_reward_trainer.rl.policy import Policy, action_logprobs, likeliest_actions, microbatches
from dense_reward_trainer.rl.prompts import prompts_of_step
from dense_reward_trainer.rl.records import TokenRewards
from dense_reward_trainer.rl.sampling import Sampling, sample
from dense_reward_trainer.runs.timer import Timer

KL_ERROR_LIMIT = 0.2  # Ziegler et al.: the relative error that the controller acts upon is clipped to this


class LearnerState(TypedDict):
    """A learner after a step, as plain values and tensors."""

    model: dict[str, Tensor]
    optimiser: dict[str, Any]
    kl_coefficient: float
    average: dict[str, Any] | None


@dataclass(slots=True, eq=False)
class Learner:
    """A policy in training. All of it changes from step to step, but for the configuration."""

    config: DprConfig
    policy: Policy
    optimiser: AdamW
    kl_coefficient: float
    average: AveragedModel | None

    @classmethod
    def of(cls, config: DprConfig, policy: Policy) -> Self:
        """Before the first step."""
        average = None
        if config.average_decay is not None:
            average = AveragedModel(policy.model, avg_fn=partial(moved, config.average_decay))
            average.update_parameters(policy.model)  # the first call copies: the average starts at the first weights
        return cls(config, policy, make_optimiser(config, policy.model), config.kl_coefficient, average)

    @property
    def result(self) -> Policy:
        """What is measured and kept: the averaged policy where weights are averaged."""
        if self.average is None:
            return self.policy
        model: PreTrainedModel = self.average.module
        return replace(self.policy, model=model)

    def step(self, step: int, prompts: Sequence[IdArray], rewards: TokenRewards) -> dict[str, float]:
        """Learn from fresh samples of the policy as it is; step 1, 2, ... Gives what the step was like.

        Raises JobError where a gradient is not finite, without the optimiser step that it was for.
        """
        config, clock = self.config, Timer()
        batch = self.sampled(step, prompts, rewards, clock)
        set_learning_rate(self.optimiser, learning_rate(config, step))
        updated = self.update(batch, actions(batch, config, self.kl_coefficient))
        clock.lap("update_s")

        described = describe(batch, shaped_rewards(batch, config, self.kl_coefficient))
        described["kl_coefficient"] = self.kl_coefficient
        described["learning_rate"] = learning_rate(config, step)
        described["computed_tokens"] = float(sum(len(r.prompt_P) + len(r.response_T) for r in batch.rollouts))
        described["scored_tokens"] = float(batch.mask_BT.sum()) * (1 + batch.named)
        if self.average is not None:
            self.average.update_parameters(self.policy.model)
        if config.kl_target is not None:
            self.kl_coefficient *= adaptation(described["kl_to_sft"], config.kl_target, config.kl_adaptation)
        return described | updated | clock.report(int(batch.mask_BT.sum()))

    def sampled(self, step: int, prompts: Sequence[IdArray], rewards: TokenRewards, clock: Timer) -> Batch:
        """Fresh samples of the policy as it is, scored; the same for the same step, prompts and weights."""
        config = self.config
        chosen = prompts_of_step(prompts, step, config.prompts_per_step, config.seed)
        rollouts = sample(self.policy, chosen, sampling_of(config), seed_of(config.seed, step))
        clock.lap("rollout_s")
        asked, responses = [r.prompt_P for r in rollouts], [r.response_T for r in rollouts]
        ids_BTM, logprob_BTM = likeliest_actions(
            self.policy, asked, responses, config.candidates, config.microbatch_tokens
        )
        named = None
        if config.candidates:
            named = [ids_TM[: len(ids), 1:].numpy() for ids_TM, ids in zip(ids_BTM, responses, strict=True)]
        clock.lap("logprob_s")
        scored = rewards.score(rollouts, named)
        clock.lap("score_s")
        return assemble(rollouts, ids_BTM, logprob_BTM, scored)

    def gradient(self, batch: Batch) -> Tensor:
        """Of the loss on a batch that the policy as it is has sampled, all weights in one row, float32, on the CPU."""
        acts = actions(batch, self.config, self.kl_coefficient)
        self.optimiser.zero_grad(set_to_none=True)
        self._backward(batch, acts, self._no_logprobs(acts), first=True)
        return flat_gradient(self.policy.model)

    def update(self, batch: Batch, acts: Actions) -> dict[str, float]:
        """`updates_per_batch` optimiser steps on a batch; loss and gradient norm before clipping of the last one.

        The first finds the policy that sampled the batch, and notes its log-probs for the ratios of the others.
        """
        old_BTM = self._no_logprobs(acts)
        loss = norm = 0.0
        for index in range(self.config.updates_per_batch):
            self.optimiser.zero_grad(set_to_none=True)
            loss = self._backward(batch, acts, old_BTM, first=index == 0)
            parameters = self.policy.model.parameters()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
            if not math.isfinite(norm):
                raise JobError(
                    f"the gradient's norm is {norm}: training has diverged; start in another output_dir with a lower "
                    "learning_rate or a higher kl_coefficient"
                )
            self.optimiser.step()
        return {"loss": loss, "grad_norm": norm}

    def _no_logprobs(self, acts: Actions) -> Tensor:
        """Where the log-probs of the policy that sampled are noted, [B, T, M]."""
        return torch.zeros(acts.ids_BTM.shape, dtype=torch.promote_types(self.policy.model.dtype, torch.float32))

    def _backward(self, batch: Batch, acts: Actions, old_BTM: Tensor, *, first: bool) -> float:
        """Adds the gradient of the loss on the whole batch, by microbatches; the loss."""
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
                acts.ids_BTM[part],
                config.temperature,
            )
            if first:
                old_BTM[part] = logprob_btm.detach().cpu()
            there = [tensor[part].to(policy.device) for tensor in (old_BTM, acts.advantage_BTM, acts.weight_BTM)]
            clip = config.ratio_clip if config.updates_per_batch > 1 else None
            part_loss = policy_gradient(logprob_btm, *there, over=over, clip=clip)
            if config.kl_penalty != "reward":
                sft_bt, mask_bt = (t[part].to(policy.device) for t in (batch.sft_logprob_BT, batch.mask_BT))
                penalty = kl_loss(config.kl_penalty, logprob_btm[..., 0], sft_bt, mask_bt, over)
                part_loss = part_loss + self.kl_coefficient * penalty
            torch.autograd.backward(part_loss)
            loss += float(part_loss.detach())
        return loss

    def state(self) -> LearnerState:
        """All that a later process needs to go on from here."""
        return {
            "model": self.policy.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "kl_coefficient": self.kl_coefficient,
            "average": None if self.average is None else self.average.state_dict(),
        }

    def restore(self, state: LearnerState) -> None:
        """Go on from a `state`."""
        self.policy.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.kl_coefficient = state["kl_coefficient"]
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])


def flat_gradient(model: PreTrainedModel) -> Tensor:
    """The gradients of all weights in one row, float32, on the CPU; a weight that has none counts with 0."""
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
    """A seed for the samples of one step, so that a resumed run draws what an unbroken one would have drawn."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def moved(decay: float, averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    """An exponential moving average's next value; the first few weigh more, lest the start weigh for long."""
    return torch.lerp(averaged, current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))


def adaptation(kl: float, target: float, speed: float) -> float:
    """The factor by which the KL coefficient changes after a step (Ziegler et al., arXiv 1909.08593, section 2.2)."""
    error = min(max(kl / target - 1, -KL_ERROR_LIMIT), KL_ERROR_LIMIT)
    return 1 + speed * error


def describe(batch: Batch, paid_BT: Tensor) -> dict[str, float]:
    """What the samples of a step were like. KL and entropy are estimates from these samples, in nats."""
    log_ratio_BT = (batch.policy_logprob_BT - batch.sft_logprob_BT) * batch.mask_BT
    tokens, responses = float(batch.mask_BT.sum()), len(batch.rollouts)
    return {
        "reward_mean": float(batch.signal_BT.sum()) / tokens,
        "reward_sum": float(batch.signal_BT.sum()) / responses,
        "paid_sum": float((paid_BT * batch.mask_BT).sum()) / responses,
        "kl_to_sft": float(log_ratio_BT.sum()) / responses,
        "kl_to_sft_per_token": float(log_ratio_BT.sum()) / tokens,
        "entropy": -float(batch.policy_logprob_BT.sum()) / tokens,
        "length_mean": tokens / responses,
        "truncated": sum(not rollout.finished for rollout in batch.rollouts) / responses,
    }
