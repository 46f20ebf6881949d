"""Configuration of the `sft` job. Must not import torch: the command line parses before it imports anything slow."""

from datetime import date
from typing import ClassVar, Literal, Self

from dense_reward.text.tokenizer import RendererName
from pydantic import Field, JsonValue, model_validator

from dense_reward_trainer.configs.base import REPORT_TO, FractionOrStart, JobConfig, JobOptions, SafeName, Seed, Tracker
from dense_reward_trainer.data.sources import DataSource


class ScratchOptions(JobOptions):
    """A small Llama with random weights and a byte-level BPE tokenizer trained on the data; each digit is one token."""

    vocabulary: int = Field(
        default=512, ge=260, description="Maximum number of token ids: 4 special tokens, 256 bytes, the rest merges."
    )
    hidden_size: int = Field(default=128, ge=8, description="Width of the hidden states; a multiple of 2 * heads.")
    layers: int = Field(default=4, ge=1, description="Number of transformer layers.")
    heads: int = Field(default=4, ge=1, description="Number of attention heads.")
    kv_heads: int | None = Field(
        default=None, ge=1, description="Number of key and value heads; null: as many as heads."
    )
    intermediate_size: int = Field(default=384, ge=8, description="Width of the feed-forward layers.")
    max_position_embeddings: int = Field(default=256, ge=8, description="Longest sequence, in tokens.")
    tie_embeddings: bool = Field(
        default=True, description="The output layer shares the weights of the input embedding."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of twice the {self.heads} heads")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self


class LoraOptions(JobOptions):
    """Low-rank adapters on a frozen base model (arXiv 2106.09685)."""

    r: int = Field(default=16, ge=1, description="Rank of the adapters.")
    alpha: int = Field(default=32, ge=1, description="The adapter's output is scaled by alpha / r.")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Dropout before the adapters, in training only.")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", description="`all-linear`, or the names of the layers that get an adapter."
    )
    quantise: Literal["4bit"] | None = Field(
        default=None,
        description="4bit: the frozen base is held in NF4 (QLoRA, arXiv 2305.14314); needs a GPU and bitsandbytes. The "
        "service adds the adapter to the base as it is on disk, and says so. null: not quantised.",
    )


class SftConfig(JobConfig):
    """Supervised fine-tuning (SFT): the demonstrations, the initial model, the optimiser and the checkpoints."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "save_every_steps", "log_every_steps", "threads", "report_to", "allow_memory"}
    )

    data: DataSource = Field(description="The demonstrations.")
    base_model: str | None = Field(default=None, description="Model to start from: a folder, or a hub id[@revision].")
    scratch: ScratchOptions | None = Field(
        default=None, description="Start from random weights instead of a base model."
    )
    lora: LoraOptions | None = Field(default=None, description="Train low-rank adapters; null: train every weight.")
    renderer: RendererName | None = Field(
        default=None,
        description="How messages become text. null: plain for a model from scratch, chat for a base model.",
    )
    template_kwargs: dict[str, JsonValue] | None = Field(
        default=None,
        description="Variables that the chat template gets, such as {enable_thinking: false}; stored in the manifests.",
    )
    response_prefix: str | None = Field(
        default=None,
        description="Text between the generation prompt and a response: context, not learnt. Empty: no text between "
        "them. null: as the base model's manifest decides; refused if a decision is needed and there is none.",
    )
    template_date: date | None = Field(
        default=None,
        description="Date for a chat template that writes one; null: that of the base model's manifest, else the day "
        "on which the run starts.",
    )
    end_of_turn: str | None = Field(
        default=None,
        description="Token that ends a response; null: that of the base model's manifest, else of the chat template.",
    )
    train_on: Literal["response", "all_assistant"] = Field(
        default="response", description="Tokens in the loss: the last response, or every assistant turn."
    )
    milestones: dict[SafeName, FractionOrStart] = Field(
        default={"reference": 0.5},
        description="Checkpoints written during the run: name -> fraction of the samples that the whole run processes. "
        "0: the untrained start; if that is a base model, its files are named, not copied.",
    )

    epochs: int = Field(default=1, ge=1, description="Passes over the training demonstrations.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps of the run; null: as many as `epochs` takes."
    )
    batch_size: int = Field(default=32, ge=1, description="Sequences per device and forward pass.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Forward passes per optimiser step.")
    learning_rate: float = Field(default=2e-5, gt=0.0, allow_inf_nan=False, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="linear", description="Learning rate after the warm-up: down to 0 (linear, cosine), or constant."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Optimiser steps in which the learning rate rises from 0.")
    weight_decay: float = Field(default=0.0, ge=0.0, description="Weight decay of AdamW.")
    adam_beta2: float = Field(default=0.999, gt=0.0, lt=1.0, description="Second beta of AdamW.")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="The gradient is clipped to this norm.")
    max_length_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Longer demonstrations are refused, or skipped with data.skip_bad; null: the model's own limit.",
    )
    group_by_length: bool = Field(
        default=False, description="Put samples of similar length in one batch: less padding."
    )
    packing: bool = Field(
        default=False,
        description="Join short demonstrations into rows of at most max_length_tokens, without padding; batch_size "
        "counts rows. Each demonstration is computed as if it were alone; a model in which that is not so is refused.",
    )
    seed: Seed = Field(default=0, description="Seed of the initial weights and of the order of the samples.")

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type of the computation. With bfloat16, trained weights stay float32; the frozen base of an "
        "adapter becomes bfloat16.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a fifth more time."
    )
    liger: bool = Field(
        default=False, description="Use the fused layers of Liger Kernel, which must be installed; needs a GPU."
    )
    allow_memory: bool = Field(
        default=False, description="Train even if the estimated memory is more than the GPU has free."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null: torch chooses.")

    save_every_steps: int = Field(
        default=100, ge=1, description="Optimiser steps between training states; a killed run resumes from the newest."
    )
    log_every_steps: int = Field(default=10, ge=1, description="Optimiser steps between lines of metrics.jsonl.")
    eval_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimiser steps between evaluations of the held-out loss; also after the last step. null: never.",
    )
    report_to: tuple[Tracker, ...] = Field(default=(), description=REPORT_TO)

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.base_model is None) == (self.scratch is None):
            raise ValueError("give either base_model or scratch: training starts from one of them")
        if self.lora is not None and self.scratch is not None:
            raise ValueError("lora needs a base_model: a model from scratch has nothing to adapt")
        if self.packing and self.group_by_length:
            raise ValueError("packing leaves no padding that group_by_length could save: set one of them to false")
        if "sft" in self.milestones:
            raise ValueError("a milestone cannot be called sft: that is the name of the finished checkpoint")
        return self
