"""The configuration of the regimes study. Must not import torch."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, JsonValue, model_validator

from dense_reward_trainer.configs.base import JobConfig, JobOptions, SafeName
from dense_reward_trainer.data.arithmetic import ArithmeticOptions

Overrides = dict[str, JsonValue]
Temperature = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
RESERVED = frozenset({"sft", "reference", "continued", "tempered", "evaluation"})


class Regime(JobOptions):
    """What a regime changes: options of the SFT run, and the problems that policies are trained and measured on."""

    sft: Overrides = Field(default={}, description="key.sub -> value, over the sweep's `sft`.")
    problems: ArithmeticOptions | None = Field(
        default=None,
        description="Problems that policies are trained and measured on; null: the problems of the demonstrations.",
    )


class Column(JobOptions):
    """One DPR run: a recipe, options that differ from it, and the checkpoint of the SFT run that is the reference."""

    recipe: str = Field(default="arithmetic_dpr", description="A shipped recipe of the job dpr, or a file.")
    reference: SafeName = Field(default="reference", description="A milestone of the SFT run.")
    dpr: Overrides = Field(default={}, description="key.sub -> value, over the sweep's `dpr`.")


class SweepConfig(JobConfig):
    """SFT runs under several regimes, DPR on each, and alternatives to DPR at matched KL and FLOPs.

    Columns: `sft`, the SFT model; `tempered`, the SFT model at the temperature at which its KL is that of the `matched`
    column; `continued`, SFT continued for the FLOPs of that column, rollouts and scoring included; and each of
    `columns`, a DPR run with its own options and reference.
    """

    resume_may_change: ClassVar[frozenset[str]] = frozenset({"output_dir", "processes", "seeds", "threads"})

    regimes: dict[SafeName, Regime] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2),
        min_length=2,
        description="Seeds of data, training and samples; intervals are over the seeds.",
    )
    problems: ArithmeticOptions = Field(
        description="Problems of demonstrations and prompts, unless a regime sets its own."
    )
    held_out_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    sft: Overrides = Field(default={}, description="key.sub -> value, over recipe `arithmetic_sft`.")
    continued: Overrides = Field(default={}, description="key.sub -> value, for SFT that continues from the SFT model.")
    dpr: Overrides = Field(default={}, description="key.sub -> value, over the recipes of all columns.")
    columns: dict[SafeName, Column] = Field(min_length=1, description="Name -> what this DPR run changes.")
    matched: SafeName = Field(description="The column whose KL and FLOPs the alternatives get.")
    temperatures: tuple[Temperature, ...] = Field(
        default=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
        min_length=2,
        description="Temperatures at which the SFT model is sampled; between them, figures are interpolated in its KL.",
    )
    evaluate: Overrides = Field(default={}, description="key.sub -> value, over recipe `arithmetic_evaluate`.")
    processes: int = Field(
        default=1,
        ge=1,
        description="Cells that run in parallel; with more than one, each writes its output to its log.txt.",
    )
    threads: int = Field(default=2, ge=1, description="CPU threads of every job and of its service.")

    @model_validator(mode="after")
    def _valid_columns_and_seeds(self) -> Self:
        taken = sorted(name for name in self.columns if name in RESERVED or name.startswith("tempered_"))
        if taken:
            raise ValueError(
                f"columns.{taken[0]}: this name is reserved for a column of the study itself: choose another"
            )
        if self.matched not in self.columns:
            raise ValueError(
                f"matched {self.matched!r} is none of the columns: set it to one of {', '.join(self.columns)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds {list(self.seeds)} repeats a seed, so intervals would be too narrow: list each seed once"
            )
        if list(self.temperatures) != sorted(set(self.temperatures), reverse=True):
            raise ValueError(
                "temperatures must fall, so that the KL rises from each to the next: list each once, the highest first"
            )
        return self
