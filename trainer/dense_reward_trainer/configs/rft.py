"""Configuration of the `rft` job. Must not import torch: the command line parses before it imports anything slow."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobConfig, JobOptions, Seed
from dense_reward_trainer.configs.dpr import (
    AUTO,
    PRECISION,
    THREADS,
    Device,
    DprConfig,
    HeldOutOptions,
    Precision,
    Schedule,
)
from dense_reward_trainer.data.sources import DataSource

HeadLoss = Literal["aligned", "terminal"]


class HeadOptions(JobOptions):
    """How the scalar head, and the layers below it, are trained on the pairs of a round."""

    loss: HeadLoss = Field(
        default="aligned",
        description="aligned: compares the values of demonstration and answer position by position, from the first "
        "token where they differ (the authors' code of arXiv 2405.17888). terminal: compares the values after their "
        "last tokens (arXiv 2503.13538; the loss of TRL's RewardTrainer).",
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the pairs of the round.")
    batch_size: int = Field(default=4, ge=1, description="Pairs in a forward pass.")
    gradient_accumulation: int = Field(default=4, ge=1, description="Forward passes per optimiser step.")
    learning_rate: float = Field(default=1e-6, gt=0.0, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="linear", description="Learning rate after the warm-up: down to 0 (linear, cosine), or constant."
    )
    warmup_steps: int = Field(default=50, ge=0, description="Optimiser steps in which the learning rate rises from 0.")
    weight_decay: float = Field(default=0.0, ge=0.0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="The gradient is clipped to this norm.")
    log_every_steps: int = Field(default=10, ge=1, description="Optimiser steps between lines of the log.")


class PolicyStepOptions(JobOptions):
    """How the policy learns from the head: REINFORCE with a leave-one-out baseline (RLOO, arXiv 2402.14740).

    The reward of a response is the head's value after its last token, as in the code of both papers.
    """

    steps: int = Field(ge=1, description="Optimiser steps of a round, each on a new batch of samples.")
    prompts_per_step: int = Field(default=16, ge=1, description="Prompts in each batch.")
    group_size: int = Field(default=4, ge=2, description="Responses sampled for each prompt.")
    kl_coefficient: float = Field(
        default=0.05,
        ge=0.0,
        allow_inf_nan=False,
        description="b in the objective E[reward] - b KL(pi || pi_sft), where pi_sft is the policy that the run "
        "started from. The values of a head have no unit, so b depends on how far they spread.",
    )
    learning_rate: float = Field(default=1e-6, gt=0.0, description="Peak learning rate of AdamW.")
    schedule: Schedule = Field(default="constant", description="Learning rate after the warm-up, in each round.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps in which the learning rate rises from 0.")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="The gradient is clipped to this norm.")

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, but must be below steps, which is {self.steps}")
        return self


class RftConfig(JobConfig):
    """Reward learning from demonstrations (RFT, arXiv 2405.17888): rounds of a reward model and of policy steps."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset({"output_dir", "threads", "microbatch_tokens"})

    policy: Path = Field(description="Folder of the SFT model: the first policy, and that of the KL penalty.")
    head_start: Path | None = Field(
        default=None, description="Checkpoint whose layers the first head starts from, such as the base; null: policy."
    )
    data: DataSource = Field(description="The demonstrations: the training part of its split, as in the SFT run.")
    held_out: Path | None = Field(
        default=None, description="Prompts to evaluate on: held_out.jsonl of the SFT run. null: no evaluation."
    )
    rounds: int = Field(default=1, ge=1, description="Rounds of generation, head and policy.")
    demonstrations_per_round: int | None = Field(
        default=None,
        ge=2,
        description="Demonstrations that a round compares with its own answers; null: all of them, divided by rounds.",
    )
    earlier_pairs: bool = Field(
        default=True, description="A round's head also learns from the pairs of all earlier rounds (arXiv 2503.13538)."
    )
    warm_start: bool = Field(
        default=True, description="A round's head starts from that of the round before; false: always from head_start."
    )
    held_out_pairs: float = Field(
        default=0.1, ge=0.0, lt=1.0, description="Share of a round's pairs that the head is judged on, not trained on."
    )
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False, description="Temperature of the answers.")
    max_new_tokens: int = Field(default=256, ge=1, description="Maximum length of an answer, in tokens.")
    rollout_batch_size: int = Field(default=64, ge=1, description="Answers generated in one batch.")
    head: HeadOptions = Field(default=HeadOptions(), description="How the head learns.")
    policy_steps: PolicyStepOptions | None = Field(
        default=None, description="How the policy learns from the head; null: not at all, for a single round."
    )
    microbatch_tokens: int = Field(default=8192, ge=1, description="Tokens in one forward pass, padding included.")
    held_out_options: HeldOutOptions = Field(default=HeldOutOptions(), description="How held_out is measured.")
    seed: Seed = Field(default=0, description="Seed of the order of the data and of all samples.")
    device: Device = Field(default="auto", description=AUTO)
    precision: Precision = Field(default="float32", description=PRECISION)
    threads: int | None = Field(default=None, ge=1, description=THREADS)

    @model_validator(mode="after")
    def _rounds_change_the_policy(self) -> Self:
        if self.rounds > 1 and self.policy_steps is None:
            raise ValueError(
                "without policy_steps all rounds would have the same policy: set rounds to 1, or give them"
            )
        return self

    def learner(self, options: PolicyStepOptions, seed: int) -> DprConfig:
        """The steps of one round in the terms of the dpr job."""
        return DprConfig(
            output_dir=self.output_dir,
            policy=self.policy,
            prompts=self.data,
            steps=options.steps,
            prompts_per_step=options.prompts_per_step,
            group_size=options.group_size,
            temperature=1.0,
            max_new_tokens=self.max_new_tokens,
            rollout_batch_size=self.rollout_batch_size,
            returns="reward_to_go",
            baseline="leave_one_out",
            kl_coefficient=options.kl_coefficient,
            learning_rate=options.learning_rate,
            schedule=options.schedule,
            warmup_steps=options.warmup_steps,
            max_grad_norm=options.max_grad_norm,
            microbatch_tokens=self.microbatch_tokens,
            seed=seed,
            precision=self.precision,
        )
