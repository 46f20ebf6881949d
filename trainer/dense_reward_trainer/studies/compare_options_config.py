"""The configuration of the estimator study on an exact task. Must not import torch."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, ValidationError, model_validator

from dense_reward_trainer.configs.base import Fraction, JobConfig, JobOptions, SafeName
from dense_reward_trainer.configs.dpr import DprConfig

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
    """Options of DPR compared on tasks whose optimum is known: gap closed, by steps and scored tokens."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset({"output_dir", "processes", "seeds"})

    task: TaskOptions = TaskOptions()
    kl_coefficient: float = Field(default=0.5, gt=0.0, description="b of the objective E[sum r] - b KL(pi || pi_sft).")
    estimators: dict[SafeName, dict[str, Override]] = Field(
        min_length=1, description="Name -> its options of the DPR job; all others keep their defaults."
    )
    steps: int = Field(default=400, ge=1, description="Batches of samples.")
    prompts_per_step: int = Field(default=4, ge=1)
    group_size: int = Field(default=8, ge=1, description="Responses to each prompt.")
    learning_rates: tuple[Rate, ...] = Field(
        default=(1e-3, 3e-3, 1e-2), min_length=1, description="Each estimator gets the best of these."
    )
    tuning_seed: int = Field(default=1000, ge=0, description="Seed of the task on which learning rates are chosen.")
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=1, description="Seeds of the reported tasks: expert, demonstrations, samples."
    )
    evaluate_first: int = Field(default=50, ge=0, description="The first steps, each of which is evaluated exactly.")
    evaluate_every: int = Field(
        default=10, ge=1, description="Steps between later evaluations; the last step is evaluated too."
    )
    processes: int = Field(default=1, ge=1, description="Runs in parallel, one thread each.")

    @model_validator(mode="after")
    def _valid_estimators(self) -> Self:
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed {self.tuning_seed} is one of the seeds, so learning rates would be chosen on a reported "
                "task: choose another tuning_seed"
            )
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
    counts the sampled tokens and candidates that were scored up to that step.
    """

    estimator: str
    learning_rate: float
    seed: int
    steps: tuple[int, ...]
    scored_tokens: tuple[int, ...]
    gap_closed: tuple[float, ...]
    sft_objective: float
    optimal_objective: float
    cpu_s: float

    def path_in(self, folder: Path) -> Path:
        """The file of this curve."""
        return curve_path(folder, self.estimator, self.learning_rate, self.seed)


def curve_path(folder: Path, estimator: str, learning_rate: float, seed: int) -> Path:
    return folder / "curves" / estimator / f"{learning_rate:g}_{seed}.json"
