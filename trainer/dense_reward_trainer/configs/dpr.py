"""Configurations of the jobs that train a policy or could: `dpr` and `gradient`.

"The paper" in a description is that of Dense-Path REINFORCE (arXiv 2510.02493). "The paper leaves this open" says what
was available to us: its abstract, equations and reviews, but not its table of hyper-parameters. The value may be stated
there, so no recipe claims to be the paper's.

Must not import torch: the command line parses before it imports anything slow.
"""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.advantages import AdvantageOptions
from dense_reward_trainer.configs.base import REPORT_TO, JobOptions, Seed, Tracker
from dense_reward_trainer.configs.service import SERVICE_KEYS, ServiceJobConfig, ServicePairsConfig
from dense_reward_trainer.data.final_answers import AnswerChecker
from dense_reward_trainer.data.sources import DataSource

Normalise = Literal["tokens", "sequences"]
Precision = Literal["float32", "bfloat16", "float64"]
Schedule = Literal["constant", "linear", "cosine"]
Device = Literal["auto", "cpu", "cuda"]

AUTO = "auto: a GPU if there is one."
PRECISION = "Type of the policy's computation. bfloat16 keeps weights and optimiser in float32."
THREADS = "CPU threads; null: torch chooses."
CHECKER = (
    "How the answer of a response is found. final_answer: its last line that starts with `#### `. last_number: its "
    "last number. Both are compared with final_answer of the row, else with the answer of the demonstration, as "
    "numbers. exact: the whole response, compared with that of the demonstration. math_verify: numbers, LaTeX and "
    "sets, found and compared by math-verify (extra eval)."
)


class HeldOutOptions(JobOptions):
    """How a policy is measured on held-out prompts. It samples at temperature 1 unless the job sets another."""

    limit: int | None = Field(default=None, ge=1, description="Use only the first `limit` prompts; null: all.")
    samples_per_prompt: int = Field(default=4, ge=1, description="Responses sampled for each prompt.")
    max_new_tokens: int = Field(
        default=256,
        ge=1,
        description="Maximum response length, in tokens. Longer responses are cut off and count as wrong.",
    )
    checker: AnswerChecker = Field(default="final_answer", description=CHECKER)
    batch_size: int = Field(default=64, ge=1, description="Responses generated in one batch.")
    microbatch_tokens: int = Field(default=8192, ge=1, description="Tokens in one forward pass, padding included.")
    seed: Seed = Field(default=0, description="Seed of the samples, the same for all policies that are compared.")


class TrlOptions(JobOptions):
    """How TRL's GRPOTrainer computes the run, with `engine: trl`."""

    batch_size: int | None = Field(
        default=None, ge=1, description="Responses of one forward pass of a process; null: all its responses of a step."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a fifth more time."
    )
    vllm: bool = Field(
        default=False, description="Sample with vLLM inside the processes that train (a GPU; pip install vllm)."
    )


class DprConfig(AdvantageOptions, ServiceJobConfig):
    """Dense-Path REINFORCE (DPR): improves a policy on token rewards from a reward service."""

    resume_may_change: ClassVar[frozenset[str]] = SERVICE_KEYS | {
        "output_dir",
        "held_out",
        "held_out_options",
        "evaluate_every",
        "save_every",
        "threads",
        "report_to",
    }

    policy: Path = Field(description="Checkpoint folder to start from, usually the sft checkpoint that is served.")
    prompts: DataSource = Field(
        description="Where prompts come from: the training part of its split, as in the SFT run. Responses are ignored."
    )
    held_out: Path | None = Field(
        default=None, description="Prompts to evaluate on: held_out.jsonl of the SFT run. null: no evaluation."
    )
    service_url: str = Field(
        default="http://127.0.0.1:8000", description="Address of the reward service, without a path."
    )

    engine: Literal["own", "trl"] = Field(
        default="own",
        description="What samples and updates. own: this package, in one process, with all options. trl: TRL's "
        "GRPOTrainer, on one or several GPUs (start it with torchrun or accelerate launch), with vLLM by option.",
    )
    trl: TrlOptions = Field(default=TrlOptions(), description="Options of `engine: trl`.")
    steps: int = Field(
        ge=1, description="Steps of the run, each on a new batch of samples. The paper leaves this open."
    )
    prompts_per_step: int = Field(default=16, ge=1, description="Prompts in each batch. The paper leaves this open.")
    temperature: float = Field(
        default=1.0,
        gt=0.0,
        allow_inf_nan=False,
        description="Temperature of the samples and of the log-probs in the loss. Rewards and the KL penalty use "
        "log-probs at 1, also for samples at another temperature. This explores without moving the target: "
        "the optimum at 1, if the policy can represent it, is a fixed point at every temperature. There "
        "is no importance correction: elsewhere the gradient is that of the expected reward of these "
        "samples, with the log-probs of the penalty held fixed. The metric kl_to_sft is then no KL and "
        "can be negative. The paper leaves this open.",
    )
    max_new_tokens: int = Field(
        default=256,
        ge=1,
        description="Maximum response length, in tokens. Longer responses are cut off: they have no end of turn, and "
        "no reward for one.",
    )
    rollout_batch_size: int = Field(default=64, ge=1, description="Responses generated in one batch.")

    kl_target: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="Adapt kl_coefficient so that the KL reaches this many nats per response (Ziegler et al., arXiv "
        "1909.08593); null: keep it fixed. Adapting changes the objective during the run. The paper leaves this open.",
    )
    kl_adaptation: float = Field(
        default=0.1,
        gt=0.0,
        le=1.0,
        description="With kl_target: kl_coefficient changes in a step by this times the relative error of the KL.",
    )
    updates_per_batch: int = Field(
        default=1,
        ge=1,
        description="Optimiser steps on each batch of samples. From the second on the samples are off policy; "
        "importance ratios correct this for the action, not for the states before it (PPO, arXiv 1707.06347), also in "
        "loss_k2 and loss_k3.",
    )
    ratio_clip: float | None = Field(
        default=0.2,
        gt=0.0,
        allow_inf_nan=False,
        description="With updates_per_batch above 1: clip importance ratios to 1 +- this, like PPO; null: no clipping.",
    )
    average_decay: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="Measure and save an exponential moving average of the weights. Its decay per step is this, or "
        "(1 + n) / (10 + n) after n steps if that is less. null: the last weights. The paper leaves this open.",
    )
    normalise: Normalise = Field(
        default="sequences",
        description="Divide the loss by the number of responses (sequences) or of tokens. tokens is biased: the "
        "number of tokens is sampled too, so the expected gradient does not have exactly the direction of "
        "the objective's; the bias falls as the batch grows. The paper leaves this open.",
    )

    learning_rate: float = Field(
        default=1e-6, gt=0.0, description="Peak learning rate of AdamW. The paper leaves this open."
    )
    schedule: Schedule = Field(
        default="constant", description="Learning rate after the warm-up: constant, or down to 0 (linear, cosine)."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps in which the learning rate rises from 0.")
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0, description="First beta of AdamW.")
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0, description="Second beta of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0.0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="The gradient is clipped to this norm.")
    microbatch_tokens: int = Field(default=8192, ge=1, description="Tokens in one forward pass, padding included.")

    held_out_options: HeldOutOptions = Field(default=HeldOutOptions(), description="How held_out is measured.")
    evaluate_every: int = Field(
        default=20, ge=1, description="Steps between evaluations; also before the first step and after the last."
    )
    save_every: int = Field(
        default=20, ge=1, description="Steps between training states; a killed run resumes from the newest."
    )
    seed: Seed = Field(default=0, description="Seed of the order of the prompts and of the samples.")
    device: Device = Field(default="auto", description=AUTO)
    precision: Precision = Field(default="float32", description=PRECISION)
    threads: int | None = Field(default=None, ge=1, description=THREADS)
    report_to: tuple[Tracker, ...] = Field(default=(), description=REPORT_TO)

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, but must be below steps, which is {self.steps}")
        return self

    @model_validator(mode="after")
    def _options_that_fit(self) -> Self:
        if self.kl_penalty != "reward" and self.temperature != 1:
            raise ValueError("a kl_penalty in the loss needs samples at temperature 1: set temperature to 1")
        if self.kl_target is not None and self.temperature != 1:
            raise ValueError(
                "kl_target steers by a KL that is measured on samples at temperature 1: set temperature to 1, or "
                "kl_target to null"
            )
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ValueError("kl_target multiplies kl_coefficient, so 0 would stay 0: set kl_coefficient above 0")
        if self.candidates:
            self._check_candidates()
        return self

    @model_validator(mode="after")
    def _what_trl_can_do(self) -> Self:
        if self.engine == "own":
            if self.trl != TrlOptions():
                raise ValueError("the options in trl belong to engine trl: set engine to trl, or leave them out")
            return self
        faults = {
            "group_size of at least 2": self.group_size < 2,
            "candidates 0: its loss knows only the sampled ids": self.candidates > 0,
            "kl_penalty reward": self.kl_penalty != "reward",
            "kl_target null": self.kl_target is not None,
            "average_decay null": self.average_decay is not None,
            "precision float32 or bfloat16": self.precision == "float64",
        }
        for cure, wrong in faults.items():
            if wrong:
                raise ValueError(f"engine trl needs {cure}")
        return self

    def _check_candidates(self) -> None:
        """Raises ValueError if an option contradicts the sum of immediate rewards over candidates."""
        faults = {
            "temperature 1: their weights are the policy's probabilities": self.temperature != 1,
            "returns reward_to_go or immediate: total also credits earlier rewards": self.returns == "total",
            "returns reward_to_go or immediate: a minimum is no sum of parts": self.returns == "min",
            "another baseline than kl: they have their own for the immediate reward": self.baseline == "kl",
            "whiten false: it would scale only the sampled part": self.whiten,
        }
        for cure, wrong in faults.items():
            if wrong:
                raise ValueError(f"candidates need {cure}")


class GradientConfig(DprConfig, ServicePairsConfig):
    """A `dpr` recipe with its own output_dir: measures the gradient of that run before its first step, by reference."""

    resume_may_change: ClassVar[frozenset[str]] = SERVICE_KEYS | {"output_dir", "threads"}

    batches: int = Field(
        default=12,
        ge=3,
        description="Batches of samples; batch n is drawn as step n of the run would, from the initial policy.",
    )
