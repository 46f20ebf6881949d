"""Configuration of the `preview` job. Must not import torch: the command line parses before any slow import."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from dense_reward_trainer.configs.base import JobConfig, SafeName, Seed
from dense_reward_trainer.configs.dpr import AUTO, CHECKER, PRECISION, THREADS, Device, Precision
from dense_reward_trainer.configs.evaluate import Strength
from dense_reward_trainer.configs.signals import WINDOW_TOKENS
from dense_reward_trainer.data.final_answers import AnswerChecker


class PreviewConfig(JobConfig):
    """Would training on the reward help? Give the models (`run`, or `sft` and `references`) and labelled data."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset({"output_dir", "device", "threads"})

    run: Path | None = Field(
        default=None,
        description="Run folder of the sft job: its sft checkpoint, and every reference beside it. null: name them in "
        "sft and references.",
    )
    sft: Path | None = Field(default=None, description="Folder of the SFT checkpoint, instead of run.")
    references: dict[SafeName, Path] = Field(
        default={}, description="With sft: name of a reference in the tables -> its checkpoint folder."
    )
    labelled: Path = Field(
        description="File of labelled data, not used in training. Either prompts with final answers, such as "
        "held_out.jsonl of the SFT run: answers are sampled and judged by checker. Or answers that are judged already: "
        "prompt or messages, response (or a list: responses), and right: true or false (or a list of them).",
    )
    prompts: int = Field(default=50, ge=1, description="Prompts that answers are sampled to, drawn from the file.")
    samples_per_prompt: int = Field(default=4, ge=1, description="Answers sampled to each prompt by each policy.")
    checker: AnswerChecker = Field(default="final_answer", description=CHECKER + " Not used if the data has `right`.")
    max_new_tokens: int = Field(
        default=256, ge=1, description="Maximum length in tokens. Longer samples are cut off and count as wrong."
    )
    strength: Strength = Field(
        default=1.0,
        description="a of the tilted policy, pi_sft (pi_sft / pi_ref)^a in every state. DPR with returns immediate and "
        "kl_coefficient b moves towards a = 1/b.",
    )
    window_tokens: int = Field(
        default=WINDOW_TOKENS,
        ge=1,
        description="The aggregate window_min is the least mean over this many consecutive tokens of an answer.",
    )
    batch_size: int = Field(default=64, ge=1, description="Answers generated in one batch.")
    microbatch_tokens: int = Field(default=2048, ge=1, description="Tokens in one forward pass, padding included.")
    seed: Seed = Field(default=0, description="Seed of the prompts, the samples and the bootstrap.")
    device: Device = Field(default="auto", description=AUTO)
    precision: Precision = Field(default="float32", description=PRECISION)
    threads: int | None = Field(default=None, ge=1, description=THREADS)

    @model_validator(mode="after")
    def _one_way_to_name_the_models(self) -> Self:
        if (self.run is None) == (self.sft is None):
            raise ValueError("name the models in one way: run: the folder of an SFT run, or sft: a checkpoint folder")
        if self.run is not None and self.references:
            raise ValueError("run has its own references: name its checkpoint in sft instead, or leave out references")
        return self
