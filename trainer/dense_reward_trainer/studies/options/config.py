"""The configuration of the estimator study on an exact task. Must not import torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, ValidationError, model_validator

from dense_reward_trainer.configs.base import Fraction, JobConfig, JobOptions, SafeName
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.errors import ConfigError

Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Override = bool | int | float | str | None
# options that the study sets for all estimators
SHARED = frozenset({"steps", "prompts_per_step", "group_size", "kl_coefficient", "learning_rate", "seed"})


class TaskOptions(JobOptions):
    """A task that is small enough to enumerate every response, and an SFT pair that learnt it.

    The expert is a Llama with large random weights. A Llama of the same size learns from its demonstrations: it is the
    reference after the fraction `reference` of the samples, and the SFT model after all of them.
    """

    symbols: int = Field(default=5, ge=2, le=16, description="Ids besides the end of turn.")
    horizon: int = Field(default=4, ge=1, le=8, description="Tokens after which responses are cut off.")
    prompts: int = Field(default=4, ge=1, description="Number of prompts, each two symbols long.")
    hidden_size: int = Field(default=32, ge=8, multiple_of=4)
    layers: int = Field(default=2, ge=1)
    sharpness: float = Field(default=8.0, gt=0.0, description="Factor on the expert's random weights.")
    demonstrations: int = Field(
        default=2000, ge=1, description="Number of responses sampled from the expert; each is seen once."
    )
    batch_size: int = Field(default=20, ge=1, description="Demonstrations per optimiser step.")
    learning_rate: Rate = Field(default=5e-3, description="Learning rate of AdamW in SFT; falls to 0 at the end.")
    reference: Fraction = Field(default=0.5, description="Fraction of the samples after which the reference is taken.")

    @model_validator(mode="after")
    def _small_enough(self) -> Self:
        if self.prompts > self.symbols**2:
            raise ValueError(f"there are {self.symbols**2} prompts of two symbols, not {self.prompts}: lower prompts")
        if self.prompts * self.symbols ** (self.horizon - 1) > 1 << 17:
            raise ValueError("more than 131,072 states at the last step: lower symbols, horizon or prompts")
        return self


class EstimatorsConfig(JobConfig):
    """Options of DPR compared on tasks whose optimum is known: gap closed, by steps and scored tokens.

    Every estimator gets the learning rate that closes the largest part of the gap on the task of `tuning_seed`. The
    tasks of `seeds` are reported, and the difference between each estimator and `control` within every seed.
    """

    resume_may_change: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "processes", "estimators", "control", "compared", "seeds", "other_seeds"}
    )

    task: TaskOptions = TaskOptions()
    kl_coefficient: float = Field(default=0.5, gt=0.0, description="b of the objective E[sum r] - b KL(pi || pi_sft).")
    estimators: dict[SafeName, dict[str, Override]] = Field(
        min_length=2, description="Name -> its options of the DPR job; all others keep their defaults."
    )
    control: SafeName = Field(default="plain", description="The estimator that all others are compared with.")
    compared: tuple[SafeName, ...] = Field(
        default=(),
        description="Estimators that get all seeds, beside the control. Name them before the run: their p-values are "
        "corrected for this number of comparisons, those of all others for the number of others. Empty: all.",
    )
    steps: int = Field(default=400, ge=1, description="Batches of samples.")
    prompts_per_step: int = Field(default=4, ge=1)
    group_size: int = Field(default=8, ge=1, description="Responses to each prompt.")
    learning_rates: tuple[Rate, ...] = Field(
        default=(3e-4, 1e-3, 3e-3), min_length=1, description="Each estimator gets the best of these, in rising order."
    )
    wider_learning_rates: tuple[Rate, ...] = Field(
        default=(),
        description="Rates outside `learning_rates`, in rising order. An estimator whose best rate is on the edge of "
        "those that it has tried also tries the next one, until its best rate is inside or none is left.",
    )
    tuning_seed: int = Field(default=1000, ge=0, description="Seed of the task on which learning rates are chosen.")
    seeds: tuple[int, ...] = Field(
        default=(20, 21, 22), min_length=2, description="Seeds of the reported tasks: expert, demonstrations, samples."
    )
    other_seeds: int | None = Field(
        default=None,
        ge=2,
        description="Estimators that are not in `compared` get only the first so many seeds; null: all.",
    )
    evaluate_first: int = Field(default=50, ge=0, description="The first steps, each of which is evaluated exactly.")
    evaluate_every: int = Field(
        default=10, ge=1, description="Steps between later evaluations; the last step is evaluated too."
    )
    processes: int = Field(default=1, ge=1, description="Runs in parallel, one thread each.")

    @model_validator(mode="after")
    def _valid_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds {list(self.seeds)} repeats a seed, so intervals would be too narrow: list each seed once"
            )
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed {self.tuning_seed} is one of the seeds, so learning rates would be chosen on a reported "
                "task: choose another tuning_seed"
            )
        if self.other_seeds is not None and self.other_seeds > len(self.seeds):
            raise ValueError(f"other_seeds is {self.other_seeds}, but there are only {len(self.seeds)} seeds: lower it")
        return self

    @model_validator(mode="after")
    def _valid_rates(self) -> Self:
        for name, rates in (
            ("learning_rates", self.learning_rates),
            ("wider_learning_rates", self.wider_learning_rates),
        ):
            if list(rates) != sorted(set(rates)):
                raise ValueError(f"{name} must rise: list each rate once, the lowest first")
        within = [rate for rate in self.wider_learning_rates if self._inside(rate)]
        if within:
            raise ValueError(
                f"wider_learning_rates: {within[0]:g} is between the lowest and the highest of learning_rates: "
                "move it to learning_rates"
            )
        return self

    @model_validator(mode="after")
    def _valid_estimators(self) -> Self:
        unknown = [name for name in (self.control, *self.compared) if name not in self.estimators]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is named in control or compared, but is none of the estimators: "
                f"use one of {', '.join(self.estimators)}"
            )
        if self.control in self.compared:
            raise ValueError(f"compared: {self.control!r} is the control, which has no difference to itself: remove it")
        for name, overrides in self.estimators.items():
            shared = sorted(SHARED & overrides.keys() - {"group_size"})
            if shared:
                raise ValueError(f"estimators.{name}: {shared[0]} is set for all estimators: remove it here")
            try:
                self.dpr(name, self.learning_rates[0], self.seeds[0])
            except ValidationError as error:
                fault = error.errors(include_url=False)[0]
                where = ".".join([name, *map(str, fault["loc"])])
                raise ValueError(f"estimators.{where}: {fault['msg']}") from None
        return self

    def _inside(self, rate: float) -> bool:
        return self.learning_rates[0] <= rate <= self.learning_rates[-1]

    def families(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The estimators that are compared with the control: those in `compared`, then the others."""
        others = tuple(name for name in self.estimators if name != self.control and name not in self.compared)
        return (self.compared, others) if self.compared else (others, ())

    def seeds_of(self, estimator: str) -> tuple[int, ...]:
        """The reported seeds of an estimator."""
        return self.seeds[: self.other_seeds] if estimator in self.families()[1] else self.seeds

    def next_rate(self, tried: Sequence[float], best: float) -> float | None:
        """The rate to try next because `best` is on the edge of those tried; None if it is inside, or none is left."""
        lower = [rate for rate in self.wider_learning_rates if rate < min(tried)]
        higher = [rate for rate in self.wider_learning_rates if rate > max(tried)]
        if best == min(tried) and lower:
            return lower[-1]
        return higher[0] if best == max(tried) and higher else None

    def dpr(self, estimator: str, learning_rate: float, seed: int) -> DprConfig:
        """The configuration of one estimator's runs. The files and the service that it names are never used."""
        unused = {"output_dir": "unused", "policy": "unused", "prompts": {"source": "arithmetic"}, "device": "cpu"}
        shared = {
            "steps": self.steps,
            "prompts_per_step": self.prompts_per_step,
            "group_size": self.group_size,
            "max_new_tokens": self.task.horizon,
            "rollout_batch_size": 1024,
            "microbatch_tokens": 1 << 14,
            "kl_coefficient": self.kl_coefficient,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        return DprConfig.model_validate(unused | shared | self.estimators[estimator])


class Curve(JobOptions):
    """One run of one estimator: the gap closed, evaluated exactly, after each of `steps`.

    `gap_closed` is (J(pi) - J(pi_sft)) / (J* - J(pi_sft)), where J is the objective and J* its maximum. `scored_tokens`
    counts the sampled tokens and candidates that were scored up to that step. A run that `diverged` ends early.
    """

    estimator: str
    options: dict[str, Override]
    learning_rate: float
    seed: int
    steps: tuple[int, ...]
    scored_tokens: tuple[int, ...]
    gap_closed: tuple[float, ...]
    diverged: bool
    sft_objective: float
    optimal_objective: float
    cpu_s: float

    def path_in(self, folder: Path) -> Path:
        """The file of this curve."""
        return curve_path(folder, self.estimator, self.learning_rate, self.seed)


def curve_path(folder: Path, estimator: str, learning_rate: float, seed: int) -> Path:
    """The file of one run."""
    return folder / "curves" / estimator / f"{learning_rate:g}_{seed}.json"


def read_curve(config: EstimatorsConfig, estimator: str, learning_rate: float, seed: int) -> Curve:
    """A finished run. Raises ConfigError if the file is of another version, or of other options under this name."""
    path = curve_path(config.output_dir, estimator, learning_rate, seed)
    try:
        curve = Curve.model_validate_json(path.read_bytes())
    except ValidationError:
        raise ConfigError(f"{path} is not a run that this version has written: use another output_dir") from None
    if curve.options != config.estimators[estimator]:
        raise ConfigError(
            f"{path} is a run of {estimator} with other options ({curve.options}): give the new options another name, "
            "or use another output_dir"
        )
    return curve
