"""The configuration of the regimes study. Must not import torch."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, JsonValue, model_validator

from dense_reward_trainer.configs.base import JobConfig, JobOptions, SafeName
from dense_reward_trainer.data.arithmetic import ArithmeticOptions

Overrides = dict[str, JsonValue]
Temperature = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
TAKEN = frozenset({"sft", "reference", "continued", "tempered", "evaluation"})


class Regime(JobOptions):
    """What is special about the SFT run, and about the problems that policies are trained and measured on."""

    sft: Overrides = Field(default={}, description="key.sub -> value, over the sweep's own for its SFT runs.")
    problems: ArithmeticOptions | None = Field(
        default=None, description="What the policies meet; null: the problems of the demonstrations."
    )


class Column(JobOptions):
    """One DPR run: a recipe, what it changes there, and which checkpoint of the SFT run rewards are taken against."""

    recipe: str = Field(default="arithmetic_dpr", description="A shipped recipe of the job dpr, or a file.")
    reference: SafeName = Field(default="reference", description="A milestone of the SFT run.")
    dpr: Overrides = Field(default={}, description="key.sub -> value, over the sweep's own for all columns.")


class SweepConfig(JobConfig):
    """SFT runs under several regimes, what DPR makes of each, and its alternatives at matched KL and FLOPs.

    Columns: the SFT model; it sampled at the temperature whose KL is that of the `matched` column; SFT continued for
    the FLOPs of that column, rollouts and scoring counted; and each of `columns`, a DPR run with its own options and
    reference.
    """

    resume_may_change: ClassVar[frozenset[str]] = frozenset({"output_dir", "processes", "seeds", "threads"})

    regimes: dict[SafeName, Regime] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=2, description="Of data, training and samples: intervals are over them."
    )
    problems: ArithmeticOptions = Field(description="Of demonstrations and prompts, where a regime has no others.")
    held_out_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    sft: Overrides = Field(default={}, description="key.sub -> value, over recipe `arithmetic_sft`.")
    continued: Overrides = Field(default={}, description="The same for SFT that goes on from the SFT model.")
    dpr: Overrides = Field(default={}, description="key.sub -> value, over the recipes of all columns.")
    columns: dict[SafeName, Column] = Field(min_length=1, description="Name -> what this DPR run changes.")
    matched: SafeName = Field(description="The column whose KL and FLOPs the alternatives get.")
    temperatures: tuple[Temperature, ...] = Field(
        default=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
        min_length=2,
        description="At which the SFT model is sampled; what lies between is interpolated in its KL.",
    )
    evaluate: Overrides = Field(default={}, description="key.sub -> value, over recipe `arithmetic_evaluate`.")
    processes: int = Field(
        default=1, ge=1, description="Cells side by side; with several each tells of itself in its log.txt."
    )
    threads: int = Field(default=2, ge=1, description="CPU threads of every job and of its service.")

    @model_validator(mode="after")
    def _columns_that_can_be(self) -> Self:
        taken = sorted(name for name in self.columns if name in TAKEN or name.startswith("tempered_"))
        if taken:
            raise ValueError(f"columns.{taken[0]}: the study has a column of that name itself")
        if self.matched not in self.columns:
            raise ValueError(f"matched {self.matched!r} is none of the columns: {', '.join(self.columns)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is named twice, and an interval over both would be too narrow")
        if list(self.temperatures) != sorted(set(self.temperatures), reverse=True):
            raise ValueError("temperatures must fall: the KL rises from each to the next")
        return self
