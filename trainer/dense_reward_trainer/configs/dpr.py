"""Configurations of the jobs that sample from a policy: `dpr` and `evaluate`.

Where a description says "the paper leaves this open", that is the paper of Dense-Path REINFORCE (arXiv 2510.02493) as
far as it could be read. Must not import torch: the command line parses before it loads anything heavy.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from dense_reward.schemas import SignalName
from pydantic import Field, field_validator, model_validator

from dense_reward_trainer.configs.base import JobOptions, MilestoneName
from dense_reward_trainer.configs.service import SERVICE_KEYS, ServiceJobConfig
from dense_reward_trainer.data.sources import DataSource

ReturnName = Literal["reward_to_go", "immediate", "total"]
BaselineName = Literal["none", "batch", "leave_one_out", "kl"]
KlPenalty = Literal["reward", "loss_k2", "loss_k3"]
Normalise = Literal["tokens", "sequences"]
Precision = Literal["float32", "bfloat16", "float64"]
Schedule = Literal["constant", "linear", "cosine"]
Device = Literal["auto", "cpu", "cuda"]
Finite = Annotated[float, Field(allow_inf_nan=False)]

_PRECISION = "Of the policy; bfloat16: float32 weights and optimiser, computed in bfloat16."


class HeldOutOptions(JobOptions):
    """How a policy is measured on held-out prompts. Samples are drawn at temperature 1 unless a job says otherwise."""

    limit: int | None = Field(default=None, ge=1, description="Take the first this many prompts; null: all.")
    samples_per_prompt: int = Field(default=4, ge=1, description="Responses sampled to each prompt.")
    max_new_tokens: int = Field(default=256, ge=1, description="Longer responses are cut off and count as wrong.")
    batch_size: int = Field(default=64, ge=1, description="Responses generated side by side.")
    microbatch_tokens: int = Field(default=8192, ge=1, description="Tokens in one forward pass, padding included.")
    seed: int = Field(default=0, ge=0, description="Of the samples: the same for all policies that are compared.")


class DprConfig(ServiceJobConfig):
    """Dense-Path REINFORCE: a policy improved on the token rewards of a service."""

    resume_may_change: ClassVar[frozenset[str]] = SERVICE_KEYS | {
        "output_dir",
        "held_out",
        "held_out_options",
        "evaluate_every",
        "save_every",
        "threads",
    }

    policy: Path = Field(description="Checkpoint folder to start from: as a rule the sft checkpoint that is served.")
    prompts: DataSource = Field(
        description="Where prompts come from: the training side of its split, as in the SFT run. Their responses are "
        "not looked at."
    )
    held_out: Path | None = Field(
        default=None, description="held_out.jsonl of the SFT run: what to evaluate on; null: no evaluation."
    )
    service_url: str = Field(
        default="http://127.0.0.1:8000", description="Address of the reward service, without a path."
    )

    steps: int = Field(ge=1, description="Optimiser steps, each on fresh samples. The paper leaves this open.")
    prompts_per_step: int = Field(default=16, ge=1, description="The paper leaves this open.")
    group_size: int = Field(default=8, ge=1, description="Responses to each prompt. The paper leaves this open.")
    temperature: float = Field(
        default=1.0,
        gt=0.0,
        allow_inf_nan=False,
        description="Of sampling and of the log-probs that are differentiated; rewards are always at 1. At other "
        "temperatures the KL penalty is that of the policy at 1 under other samples. The paper leaves this open.",
    )
    max_new_tokens: int = Field(
        default=256,
        ge=1,
        description="Longer responses are cut off: they have no end of turn and get no reward for one.",
    )
    rollout_batch_size: int = Field(default=64, ge=1, description="Responses generated side by side.")

    signal: SignalName = Field(
        default="reward",
        description="What is paid per token: reward (equation 5), centred (reward - kl: another objective), or "
        "sft_logprob (the paper's ablation without a reference).",
    )
    candidates: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Actions per state: the policy's so many likeliest ids at every position are scored too, and the "
        "gradient of their immediate rewards is a sum over them instead of a sample; later rewards stay sampled.",
    )
    returns: ReturnName = Field(
        default="reward_to_go",
        description="What an action is credited with: the rewards from it onwards; its own reward alone (blind to what "
        "it leads to); or those of the whole response, as if they were paid at its end (the same gradient in "
        "expectation, more noise). The paper leaves this open.",
    )
    gamma: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Discount of the reward-to-go, which favours early rewards: another objective; the paper's is 1.",
    )
    baseline: BaselineName = Field(
        default="leave_one_out",
        description="Subtracted from the reward-to-go, position by position: none; the mean over the batch; the mean "
        "over the other responses to the prompt; or kl(pi_sft || pi_ref) of the state. The paper leaves this open.",
    )
    whiten: bool = Field(
        default=False, description="Advantages to mean 0 and deviation 1 over the batch. The paper leaves this open."
    )
    reward_clip: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="Signals beyond +-this many nats are clipped; null: none are. The paper leaves this open.",
    )
    kl_coefficient: Annotated[Finite, Field(ge=0.0)] = Field(
        default=0.1,
        description="b in E[sum r] - b KL(pi || pi_sft). The paper has a KL to the SFT model, but leaves this open.",
    )
    kl_penalty: KlPenalty = Field(
        default="reward",
        description="Where the KL is taken: from the reward, r_t - b (log pi - log pi_sft), which follows the KL "
        "between whole responses; or in the loss, as loss_k2 (its gradient is that of KL(pi || pi_sft)) or loss_k3 "
        "(that of KL(pi_sft || pi)), both of each state by itself and blind to later ones. The paper leaves this open.",
    )
    kl_target: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="Nats per response that kl_coefficient is steered towards (Ziegler et al., arXiv 1909.08593); "
        "null: it stays. The objective then changes on the way. The paper leaves this open.",
    )
    kl_adaptation: float = Field(
        default=0.1, gt=0.0, le=1.0, description="With kl_target: how fast, as a fraction of the error in a step."
    )
    updates_per_batch: int = Field(
        default=1,
        ge=1,
        description="Optimiser steps on each batch of samples; from the second on they are off policy, which "
        "importance ratios correct for the action and nothing for the states before it (arXiv 1707.06347).",
    )
    ratio_clip: float | None = Field(
        default=0.2,
        gt=0.0,
        allow_inf_nan=False,
        description="With updates_per_batch over 1: no more gain from ratios beyond 1 +- this; null: no clipping.",
    )
    average_decay: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="What is measured and written is the exponential moving average of the weights, with this decay a "
        "step, or (1 + n) / (10 + n) after n steps where that is less; null: the last weights. The paper leaves this "
        "open.",
    )
    normalise: Normalise = Field(
        default="sequences", description="The loss is divided by responses or by tokens. The paper leaves this open."
    )

    learning_rate: float = Field(default=1e-6, gt=0.0, description="Of AdamW. The paper leaves this open.")
    schedule: Schedule = Field(default="constant", description="After the warm-up: constant, or down to 0 at the end.")
    warmup_steps: int = Field(default=0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    microbatch_tokens: int = Field(default=8192, ge=1, description="Tokens in one forward pass, padding included.")

    held_out_options: HeldOutOptions = HeldOutOptions()
    evaluate_every: int = Field(default=20, ge=1, description="Steps; also before the first and after the last.")
    save_every: int = Field(default=20, ge=1, description="Steps after which a killed run can be taken up again.")
    seed: int = Field(default=0, ge=0, description="Of the prompts' order and of the samples.")
    device: Device = "auto"
    precision: Precision = Field(default="float32", description=_PRECISION)
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null: torch's choice.")

    @model_validator(mode="after")
    def _groups_for_leave_one_out(self) -> Self:
        if self.baseline == "leave_one_out" and self.group_size < 2:
            raise ValueError("baseline leave_one_out compares responses to one prompt: set group_size to at least 2")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves nothing of the {self.steps} steps")
        return self

    @field_validator("kl_penalty", mode="before")
    @classmethod
    def _no_k1_loss(cls, value: object) -> object:
        if value == "loss_k1":
            raise ValueError(
                "loss_k1 would do nothing: the expected gradient of log pi - log pi_sft under samples from pi is 0; "
                "set reward, loss_k2 or loss_k3"
            )
        return value

    @model_validator(mode="after")
    def _options_that_fit(self) -> Self:
        if self.gamma < 1 and self.returns != "reward_to_go":
            raise ValueError(
                f"gamma discounts the reward-to-go, which returns {self.returns} does not have: set it to 1"
            )
        if self.kl_penalty != "reward" and self.temperature != 1:
            raise ValueError("a kl_penalty in the loss is that of samples at temperature 1: set temperature to 1")
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ValueError("kl_target steers kl_coefficient by factors: start it above 0")
        if self.candidates:
            self._check_candidates()
        return self

    def _check_candidates(self) -> None:
        """Raise ValueError for what has no meaning where the immediate reward is summed over candidates."""
        faults = {
            "temperature 1: their weights are the policy's probabilities": self.temperature != 1,
            "returns reward_to_go or immediate: earlier rewards are none of theirs": self.returns == "total",
            "another baseline than kl: they bring their own for the immediate reward": self.baseline == "kl",
            "whiten false: it would scale the sampled part alone": self.whiten,
        }
        for cure, wrong in faults.items():
            if wrong:
                raise ValueError(f"candidates need {cure}")


class GradientConfig(DprConfig):
    """Where the gradient of a DPR run points before its first step: a recipe of `dpr`, an output_dir of its own."""

    resume_may_change: ClassVar[frozenset[str]] = SERVICE_KEYS | {"output_dir", "threads"}

    batches: int = Field(default=12, ge=3, description="Of samples, each as a step of the run would draw them.")


class EvaluateConfig(ServiceJobConfig):
    """Checkpoints measured side by side on the same held-out prompts."""

    resume_may_change: ClassVar[frozenset[str]] = SERVICE_KEYS | {"output_dir", "threads"}

    checkpoints: dict[MilestoneName, Path] = Field(min_length=1, description="Name in the table -> checkpoint folder.")
    held_out: Path = Field(description="held_out.jsonl of the SFT run, or any file of demonstrations.")
    temperatures: dict[MilestoneName, Annotated[Finite, Field(gt=0.0)]] = Field(
        default={},
        description="Name in the table -> temperature at which it samples, where that is not 1; the KL is then that of "
        "the policy at this temperature.",
    )
    service_url: str | None = Field(
        default=None, description="Address of the reward service to whose SFT model the KL is taken; null: no KL."
    )
    held_out_options: HeldOutOptions = HeldOutOptions()
    device: Device = "auto"
    precision: Precision = Field(default="float32", description=_PRECISION)
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null: torch's choice.")

    @model_validator(mode="after")
    def _temperatures_of_checkpoints(self) -> Self:
        unknown = sorted(self.temperatures.keys() - self.checkpoints.keys())
        if unknown:
            raise ValueError(f"temperatures.{unknown[0]}: there is no such checkpoint: {', '.join(self.checkpoints)}")
        return self
