"""The configuration of the regimes study. Must not import torch."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from dense_reward_trainer.configs.base import JobConfig, JobOptions, SafeName
from dense_reward_trainer.configs.dpr import Device
from dense_reward_trainer.launch import Strategy
from dense_reward_trainer.studies.regimes.policies import (
    AnyPolicy,
    DprPolicy,
    Overrides,
    Policy,
    other_policies,
    varied,
)
from dense_reward_trainer.tasks.write import AnyTask

Metric = Literal["sampled_accuracy", "greedy_accuracy"]
# Names of folders and policies that every cell has.
RESERVED = frozenset(
    {"sft", "base", "base_model", "task", "preview", "credit", "evaluation", "figures.json", "log.txt", "cpu_s.txt"}
)


class Regime(JobOptions):
    """A task, and what its runs change."""

    task: AnyTask
    base: Overrides = Field(default={}, description="key.sub -> value, over the sweep's `base`.")
    sft: Overrides = Field(default={}, description="key.sub -> value, over the sweep's `sft`.")
    dpr: Overrides = Field(default={}, description="key.sub -> value, over the sweep's `dpr` and each policy's.")
    evaluate: Overrides = Field(default={}, description="key.sub -> value, over the sweep's `evaluate`.")
    preview: Overrides = Field(default={}, description="key.sub -> value, over the sweep's `preview`.")
    credit: Overrides = Field(default={}, description="key.sub -> value, over the sweep's `credit`.")
    primary: SafeName | None = Field(default=None, description="The primary policy here; null: that of the sweep.")
    tuned_as: SafeName | None = Field(
        default=None, description="The regime whose values of grids are used here too; null: this one has its own."
    )
    policies: tuple[SafeName, ...] | None = Field(default=None, description="The policies of this regime; null: all.")
    seeds: tuple[int, ...] | None = Field(default=None, min_length=2, description="Seeds; null: those of the sweep.")


class Tuning(JobOptions):
    """How the values of grids are chosen: with seeds that are not reported."""

    seeds: tuple[int, ...] = Field(default=(1000,), min_length=1)
    metric: Metric = Field(default="sampled_accuracy", description="The figure whose mean over the seeds is maximised.")


class Series(JobOptions):
    """Policies that differ in one option: each value gives a policy NAME_VALUE and a point of a plot."""

    of: SafeName = Field(description="The DPR policy that is varied.")
    key: str = Field(description="An option of dpr, or `reference`.")
    values: tuple[JsonValue, ...] = Field(min_length=2)
    label: str = Field(description="What the axis says.")
    positions: tuple[float, ...] | None = Field(default=None, description="Places on the axis; null: the values.")


class SweepConfig(JobConfig):
    """SFT in several regimes; then policies that use the reward, and controls that do not, on the same problems."""

    resume_may_change: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "processes", "seeds", "regimes.*.seeds", "threads", "device", "submitit", "finished_only"}
        | {"launch", "strategy", "only"}
    )

    regimes: dict[SafeName, Regime] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(
        min_length=2, description="Seeds of data, training and samples; intervals are over the seeds."
    )
    tuning: Tuning | None = Field(default=None, description="How grids are decided; null: no policy has one.")
    sft_recipe: str = Field(default="arithmetic_sft", description="A shipped recipe of the job sft, or a file.")
    base: Overrides = Field(default={}, description="key.sub -> value: SFT of the base model, if the task has one.")
    sft: Overrides = Field(default={}, description="key.sub -> value, over `sft_recipe`.")
    dpr: Overrides = Field(default={}, description="key.sub -> value, over the recipes of all DPR policies.")
    evaluate: Overrides = Field(default={}, description="key.sub -> value, over the recipe `arithmetic_evaluate`.")
    policies: dict[SafeName, Policy] = Field(min_length=1)
    series: dict[SafeName, Series] = Field(default={}, description="Policies along an axis.")
    primary: SafeName = Field(description="The policy that is compared with every other one, paired over the seeds.")
    processes: int = Field(
        default=1, ge=1, description="Cells in parallel; each writes the output of its jobs to its log.txt."
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of every job and of its service.")
    device: Device = Field(default="cpu", description="Device of every job; with a GPU, run one cell at a time.")
    launch: int | None = Field(
        default=None,
        ge=2,
        description="Processes of each SFT and of each DPR run (which needs engine: trl), one on each GPU; the other "
        "jobs use the first GPU. null: one process.",
    )
    strategy: Strategy = Field(default="ddp", description="With launch: as --strategy of `sft --launch`.")
    preview: Overrides | None = Field(
        default=None,
        description="key.sub -> value, over recipe `arithmetic_preview`: every cell also runs the job preview before "
        "any policy is trained, and the study compares its verdict with what training did. null: no preview.",
    )
    credit: Overrides | None = Field(
        default=None,
        description="key.sub -> value, over recipe `arithmetic_credit`: every cell also measures the rewards of its "
        "SFT run, and of each policy whose training leaves a reward, by the job credit. null: no credit.",
    )
    labelled: int = Field(
        default=0, ge=0, description="The last test problems of each cell, which only the preview uses; 0 without one."
    )
    only: tuple[SafeName, ...] | None = Field(
        default=None, min_length=1, description="The regimes to run and report now; null: all of them."
    )
    finished_only: bool = Field(
        default=False, description="Run nothing: tables and pictures of the cells that are finished so far."
    )
    submitit: dict[str, JsonValue] | None = Field(
        default=None,
        description="Options of submitit's AutoExecutor, such as {slurm_partition: gpu, timeout_min: 240}: cells "
        "become jobs of a cluster (needs `pip install submitit`). null: processes of this machine.",
    )

    def narrowed(self) -> Self:
        """This study with the regimes of `only` alone."""
        wanted = self.regimes if self.only is None else self.only
        return self.model_copy(update={"regimes": {name: self.regimes[name] for name in wanted}})

    @property
    def reads_only(self) -> bool:
        """Whether the study only reports what is finished."""
        return self.finished_only

    @property
    def all_policies(self) -> dict[str, AnyPolicy]:
        """The policies and those of the series, by name."""
        found: dict[str, AnyPolicy] = dict(self.policies)
        for name, series in self.series.items():
            policy = self.policies[series.of]
            if isinstance(policy, DprPolicy):
                for value in series.values:
                    found[series_name(name, value)] = varied(policy, series.key, value)
        return found

    @model_validator(mode="after")
    def _names(self) -> Self:
        for name, one in self.series.items():
            if not isinstance(self.policies.get(one.of), DprPolicy):
                raise ValueError(f"series.{name}.of: {one.of!r} is no policy of kind dpr")
            if one.positions is not None and len(one.positions) != len(one.values):
                raise ValueError(f"series.{name}: give as many positions as values")
        policies = self.all_policies
        taken = sorted(RESERVED & policies.keys())
        if taken:
            raise ValueError(f"policies.{taken[0]}: this name is reserved for the study itself: choose another")
        named = [(f"policies.{name}", other) for name, one in policies.items() for other in other_policies(one)]
        for where, other in (("primary", self.primary), *named):
            if other not in policies:
                raise ValueError(f"{where}: {other!r} is none of the policies {', '.join(policies)}")
        if (self.preview is None) != (self.labelled == 0):
            raise ValueError("labelled is the number of problems for preview: set both or neither")
        for name in self.only or ():
            if name not in self.regimes:
                raise ValueError(f"only: {name!r} is none of the regimes {', '.join(self.regimes)}")
        _each_once("seeds", self.seeds)
        for name, regime in self.regimes.items():
            self._check_regime(name, regime)
        return self

    def _check_regime(self, name: str, regime: Regime) -> None:
        _each_once(f"regimes.{name}.seeds", regime.seeds or ())
        policies = self.all_policies
        here = policies.keys() if regime.policies is None else set(regime.policies)
        missing = sorted(here - policies.keys()) or sorted({self.primary_of(name)} - here)
        missing += [
            other for one in here & policies.keys() for other in other_policies(policies[one]) if other not in here
        ]
        if missing:
            raise ValueError(f"regimes.{name}.policies: {missing[0]!r} is none of the policies, or is needed here")

    def seeds_of(self, regime: str) -> tuple[int, ...]:
        """The reported seeds of a regime."""
        return self.regimes[regime].seeds or self.seeds

    def primary_of(self, regime: str) -> str:
        """The primary policy of a regime."""
        return self.regimes[regime].primary or self.primary

    def tuned_in(self, regime: str) -> str | None:
        """The regime whose tuning a regime uses; None if there is no such regime."""
        found = self.regimes.get(regime)
        return None if found is None else found.tuned_as or regime

    def policies_of(self, regime: str, policies: Mapping[str, AnyPolicy]) -> dict[str, AnyPolicy]:
        """Those of the policies that a regime has."""
        here = self.regimes[regime].policies
        return {name: policy for name, policy in policies.items() if here is None or name in here}

    @model_validator(mode="after")
    def _tuned_apart(self) -> Self:
        grids = sorted(name for name, policy in self.policies.items() if policy.grid)
        if self.tuning is None:
            if grids:
                raise ValueError(f"policies.{grids[0]} has a grid, but tuning is null: say how its value is chosen")
            return self
        for name, regime in self.regimes.items():
            if regime.tuned_as is not None and self.tuned_in(regime.tuned_as) != regime.tuned_as:
                raise ValueError(f"regimes.{name}.tuned_as: {regime.tuned_as!r} is no regime with its own tuning")
        for name in self.only or ():
            if (source := self.tuned_in(name)) not in (self.only or ()):
                raise ValueError(f"only: {name} uses the values that are chosen in {source}: add {source} to only")
        reported = {seed for name in self.regimes for seed in self.seeds_of(name)}
        shared = sorted(reported.intersection(self.tuning.seeds))
        if shared:
            raise ValueError(f"tuning.seeds: {shared[0]} is also reported: choose other seeds to tune with")
        return self


def series_name(series: str, value: JsonValue) -> str:
    """The name of the policy with one value of a series."""
    return f"{series}_{value}"


def _each_once(name: str, seeds: tuple[int, ...]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{name} {list(seeds)} repeats a seed, so intervals would be too narrow: list each seed once")
