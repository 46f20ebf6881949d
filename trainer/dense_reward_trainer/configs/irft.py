"""Configuration of the `irft` job: self-play on demonstrations (IRFT, SPIN, GSIL).

Must not import torch: the command line parses before it imports anything slow.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.advantages import Finite
from dense_reward_trainer.configs.base import JobConfig, JobOptions, Seed
from dense_reward_trainer.configs.dpr import AUTO, THREADS, Device
from dense_reward_trainer.configs.sft import LoraOptions
from dense_reward_trainer.data.sources import DataSource

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
PerRound = Positive | tuple[Positive, ...]
LossName = Literal["sigmoid", "bernoulli"]


class GenerationOptions(JobOptions):
    """How the model at the start of a round answers its prompts: one answer each."""

    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="What generates: transformers, or vLLM (a GPU; pip install vllm)."
    )
    temperature: Positive = Field(default=1.0, description="Sampling temperature.")
    top_p: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Sample only among the likeliest tokens that together have this probability; 1: all.",
    )
    greedy: bool = Field(default=False, description="Take the likeliest token each time instead of sampling.")
    max_new_tokens: int = Field(
        default=256, ge=1, description="Maximum length of an answer, in tokens. Longer answers are cut off."
    )
    batch_size: int = Field(default=64, ge=1, description="Answers generated together, and written to disk together.")

    @model_validator(mode="after")
    def _greedy_alone(self) -> Self:
        if self.greedy and (self.temperature != 1.0 or self.top_p != 1.0):
            raise ValueError("greedy ignores temperature and top_p: leave them out")
        return self


class IrftConfig(JobConfig):
    """Self-play: in each round, the model learns to prefer demonstrations to its own answers (IRFT, SPIN, GSIL)."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "save_every_steps", "log_every_steps", "threads"}
    )

    policy: Path = Field(description="Checkpoint folder to start from: an SFT checkpoint, or any adopted one.")
    data: DataSource = Field(description="The demonstrations; best those of the SFT run, with its data settings.")
    rounds: int = Field(default=1, ge=1, description="Rounds T. Each one generates its own answers.")
    prompts: Literal["share", "all"] = Field(
        default="share",
        description="Prompts of a round. share: an equal part, which no other round uses (IRFT). all: all (SPIN).",
    )
    previous_rounds: Literal[0, 1] = Field(
        default=0, description="1: also train on the pairs of the round before (SPIN); 0: only on those of the round."
    )

    loss: LossName = Field(
        default="sigmoid",
        description="sigmoid: on the difference of the two log-ratios (IRFT, SPIN). bernoulli: on each of them (GSIL).",
    )
    bernoulli_b: Finite = Field(default=0.0, description="The constant b of the loss bernoulli.")
    beta: PerRound = Field(default=0.1, description="Factor of the log-ratios; a number, or a list of one per round.")

    epochs: int = Field(default=1, ge=1, description="Passes over the pairs of a round.")
    steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps K of a round; null: as many as `epochs` takes."
    )
    batch_size: int = Field(default=8, ge=1, description="Pairs per forward pass.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Forward passes per optimiser step.")
    optimiser: Literal["rmsprop", "adamw"] = Field(
        default="rmsprop",
        description="The papers use RMSprop. Each round starts with a new one, and a new schedule.",
    )
    learning_rate: PerRound = Field(
        default=5e-7, description="Peak learning rate; a number, or a list of one per round."
    )
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="linear", description="Learning rate after the warm-up: down to 0 (linear, cosine), or constant."
    )
    warmup_fraction: float = Field(
        default=0.1, ge=0.0, lt=1.0, description="Share of a round's steps in which the learning rate rises from 0."
    )
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False, description="Weight decay.")
    max_grad_norm: Positive = Field(default=1.0, description="The gradient is clipped to this norm.")
    max_length_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Longest prompt with its demonstration, or with its generated answer. Longer ones are refused, or "
        "left out with data.skip_bad; null: the model's own limit.",
    )
    lora: LoraOptions | None = Field(
        default=None,
        description="Train low-rank adapters, and merge them after each round; null: train every weight.",
    )
    generation: GenerationOptions = Field(
        default_factory=GenerationOptions, description="How the model generates its answers."
    )
    seed: Seed = Field(default=0, description="Seed of the shares, of the answers and of the order of the pairs.")

    device: Device = Field(default="auto", description=AUTO)
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type of the computation. bfloat16 keeps weights and optimiser in float32."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a fifth more time."
    )
    threads: int | None = Field(default=None, ge=1, description=THREADS)

    save_every_steps: int = Field(
        default=100, ge=1, description="Optimiser steps between training states; a killed run resumes from the newest."
    )
    log_every_steps: int = Field(default=10, ge=1, description="Optimiser steps between lines of metrics.jsonl.")

    @model_validator(mode="after")
    def _one_value_per_round(self) -> Self:
        for name in ("beta", "learning_rate"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.rounds:
                raise ValueError(
                    f"{name} lists {len(value)} values for {self.rounds} rounds: give one number, or one per round"
                )
        return self

    @model_validator(mode="after")
    def _loss_reads_its_options(self) -> Self:
        if self.loss == "sigmoid" and self.bernoulli_b != 0.0:
            raise ValueError("bernoulli_b belongs to the loss bernoulli: set loss=bernoulli, or leave it out")
        if self.previous_rounds and self.rounds == 1:
            raise ValueError("previous_rounds is 1, but a single round has no round before: set it to 0")
        return self

    @model_validator(mode="after")
    def _no_dropout(self) -> Self:
        if self.lora is not None and self.lora.dropout > 0.0:
            raise ValueError("lora.dropout must be 0: with dropout, the model is not its own reference at the start")
        return self

    def beta_of(self, number: int) -> float:
        """beta of round 1, 2, ..."""
        return self.beta[number - 1] if isinstance(self.beta, tuple) else self.beta

    def learning_rate_of(self, number: int) -> float:
        """Peak learning rate of round 1, 2, ..."""
        rate = self.learning_rate
        return rate[number - 1] if isinstance(rate, tuple) else rate
