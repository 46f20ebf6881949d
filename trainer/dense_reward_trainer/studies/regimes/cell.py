"""One cell of the regimes study, a regime with a seed: its folders, and the names of its checkpoints."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.configs.rft import RftConfig
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.studies.regimes.config import Regime, SweepConfig
from dense_reward_trainer.studies.regimes.policies import (
    AnyPolicy,
    DprPolicy,
    MatchedKlPolicy,
    Overrides,
    RftPolicy,
    SampledPolicy,
    SelfPlayPolicy,
    SftPolicy,
    sampled_at,
)
from dense_reward_trainer.tasks.write import TaskFiles

# The milestone at 0: the model that the SFT run starts from.
START = "base"
# Options of evaluate's policies that are folders; a cell names them by its checkpoints.
FOLDER_OPTIONS = ("checkpoint", "tilt.reference", "extrapolate.base")


@dataclass(frozen=True, slots=True)
class Cell:
    """One regime with one seed, its policies (none has a grid), and the paths in its folder."""

    config: SweepConfig
    regime: str
    seed: int
    policies: Mapping[str, AnyPolicy]

    @property
    def folder(self) -> Path:
        return self.config.output_dir / self.regime / str(self.seed)

    @property
    def figures(self) -> Path:
        """The file with the figures of all policies; it exists once the cell is finished."""
        return self.folder / "figures.json"

    @property
    def log(self) -> Path:
        """The output of the cell's jobs."""
        return self.folder / "log.txt"

    @property
    def cpu_times(self) -> Path:
        """CPU seconds, one line for each time that the cell was worked on."""
        return self.folder / "cpu_s.txt"

    @property
    def files(self) -> TaskFiles:
        return TaskFiles(self.folder / "task")

    @property
    def settings(self) -> Regime:
        return self.config.regimes[self.regime]

    @property
    def is_tuning(self) -> bool:
        """Whether the cell only serves to choose the values of grids."""
        return self.config.tuning is not None and self.seed in self.config.tuning.seeds

    @property
    def checkpoints(self) -> Path:
        """The checkpoints of the SFT run: `sft` and its milestones."""
        return self.folder / "sft" / "checkpoints"

    def checkpoint(self, name: str) -> Path:
        """The folder of a checkpoint by its name: `sft`, a milestone, or a trained policy."""
        match self.policies.get(name):
            case DprPolicy():
                return self.folder / name / "checkpoints" / "policy"
            case SftPolicy() | SelfPlayPolicy():
                return self.folder / name / "checkpoints" / "sft"
            case RftPolicy() as policy:
                return self._last_of_rft(name, policy, "policy")
            case _:
                return self.checkpoints / name

    def token_head(self, name: str, policy: RftPolicy) -> Path:
        """The folder of the last token head of a policy of rft."""
        return self._last_of_rft(name, policy, "token_head")

    def _last_of_rft(self, name: str, policy: RftPolicy, kind: str) -> Path:
        return self.folder / name / "checkpoints" / f"{kind}-{rft_config(self, policy).rounds}"

    def cpu_s(self) -> float:
        """CPU seconds of all jobs of the cell and of their services."""
        return sum(float(line) for line in self.cpu_times.read_text().split()) if self.cpu_times.is_file() else 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a cell: the name of its folder, its kind and recipe, and all its overrides."""

    name: str
    kind: str
    recipe: str
    overrides: Overrides


def seeded_job(cell: Cell, name: str, kind: str, recipe: str, overrides: Overrides) -> Job:
    """A job with the cell's seed."""
    return Job(name, kind, recipe, job_folder(cell, name) | {"seed": cell.seed} | overrides)


def job_folder(cell: Cell, name: str) -> Overrides:
    return {"output_dir": str(cell.folder / name), "threads": cell.config.threads, "device": cell.config.device}


def sft_overrides(cell: Cell) -> Overrides:
    """What the sweep and the regime change in the SFT run."""
    return cell.config.sft | cell.settings.sft


def dpr_overrides(cell: Cell, policy: DprPolicy) -> Overrides:
    """What the sweep, the policy and the regime change in a DPR run."""
    return cell.config.dpr | policy.dpr | cell.settings.dpr


def rft_config(cell: Cell, policy: RftPolicy) -> RftConfig:
    """The configuration of the job rft of a policy, but for its seed."""
    own: Overrides = {"output_dir": str(cell.folder), "data": {"source": str(cell.files.train)}}
    own |= {"policy": str(cell.checkpoints / "sft"), "held_out": None}
    return load_config(RftConfig, config_path(policy.recipe), arguments(own | policy.options))


def sft_milestones(cell: Cell) -> set[str]:
    """The names of the milestones of the SFT run."""
    own: Overrides = {"output_dir": str(cell.folder), "data": {"source": str(cell.files.train)}}
    config = load_config(SftConfig, config_path(cell.config.sft_recipe), arguments(own | sft_overrides(cell)))
    return set(config.milestones)


def evaluated_policies(cell: Cell) -> dict[str, JsonValue]:
    """Name -> options of `evaluate.policies`, with folders in place of the names of checkpoints."""
    return {name: with_folders(cell, options) for name, options in policy_options(cell).items()}


def policy_options(cell: Cell) -> dict[str, dict[str, JsonValue]]:
    """Name -> options of `evaluate.policies`, with names of checkpoints."""
    found: dict[str, Mapping[str, JsonValue]] = {"sft": {}}
    if START in sft_milestones(cell):
        found[START] = {"checkpoint": START}
    for name, policy in cell.policies.items():
        match policy:
            case SampledPolicy(options=options):
                found[name] = options
            case MatchedKlPolicy():
                found |= dict(zip(points_of(name, policy), sampled_at(policy), strict=True))
            case _:
                found[name] = {"checkpoint": name}
    return {name: {"checkpoint": "sft", **options} for name, options in found.items()}


def with_folders(cell: Cell, options: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The options of a policy with the folders of the checkpoints that they name."""
    resolved = dict(options)
    for key, name in named_checkpoints(options):
        outer, _, inner = key.partition(".")
        folder = str(cell.checkpoint(name))
        nested = resolved[outer]
        resolved[outer] = {**nested, inner: folder} if isinstance(nested, dict) else folder
    return resolved


def named_checkpoints(options: Mapping[str, JsonValue]) -> Iterator[tuple[str, str]]:
    """The options that name a checkpoint, and the names."""
    for key in FOLDER_OPTIONS:
        outer, _, inner = key.partition(".")
        value = options.get(outer)
        value = value.get(inner) if inner and isinstance(value, dict) else value
        if isinstance(value, str):
            yield key, value


def check_names(cell: Cell) -> None:
    """Raise ConfigError, before anything runs, if a recipe, a reference or the name of a checkpoint is wrong."""
    always: Overrides = {"output_dir": str(cell.folder), "prompts": {"source": "prompts.jsonl"}}
    milestones = sft_milestones(cell)
    trained = {
        name
        for name, policy in cell.policies.items()
        if isinstance(policy, DprPolicy | SftPolicy | SelfPlayPolicy | RftPolicy)
    }
    for name, policy in cell.policies.items():
        if name in milestones:
            raise ConfigError(f"policies.{name}: a milestone of SFT has this name too: choose another")
        if isinstance(policy, DprPolicy):
            own = load_config(DprConfig, config_path(policy.recipe), arguments(always | dpr_overrides(cell, policy)))
            if (own.signal != "sft_logprob") != policy.uses_reward:
                raise ConfigError(
                    f"policies.{name}: regime {cell.regime} or recipe {policy.recipe} sets signal to {own.signal}, so "
                    "it is unclear whether this is a control: set signal in the policy's own dpr, and only there"
                )
            if cell.config.launch is not None and own.engine != "trl":
                raise ConfigError(
                    f"launch: policies.{name} has engine {own.engine}, which runs in one process: set trl"
                )
            _check_known(cell, name, policy.reference, milestones)
    for name, options in policy_options(cell).items():
        for _, checkpoint in named_checkpoints(options):
            _check_known(cell, name, checkpoint, {"sft"} | milestones | trained)


def _check_known(cell: Cell, policy: str, name: str, known: set[str]) -> None:
    if name not in known:
        raise ConfigError(
            f"policies.{policy}: regime {cell.regime} has no checkpoint {name!r}, only {', '.join(sorted(known))}: "
            "name a milestone in sft.milestones with its fraction (base: 0.0)"
        )


def points_of(name: str, policy: MatchedKlPolicy) -> list[str]:
    """The names of the points at which a policy with a matched KL is evaluated."""
    return [f"{name}--{index}" for index in range(len(policy.values))]


def arguments(overrides: Overrides) -> list[str]:
    """The overrides as arguments of the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
