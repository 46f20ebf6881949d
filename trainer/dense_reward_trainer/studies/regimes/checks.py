"""Refuses a regimes study that would not measure what it says, before anything runs. Must not know jobs."""

import re
from collections.abc import Iterable, Iterator, Mapping

from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.credit import CreditConfig
from dense_reward_trainer.configs.evaluate import EvaluateConfig
from dense_reward_trainer.configs.irft import IrftConfig
from dense_reward_trainer.configs.preview import PreviewConfig
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.studies.regimes.cell import Cell, arguments, evaluated_policies, rft_config, sft_overrides
from dense_reward_trainer.studies.regimes.config import Regime, SweepConfig, series_name
from dense_reward_trainer.studies.regimes.policies import (
    DprPolicy,
    MatchedKlPolicy,
    Overrides,
    RftPolicy,
    SampledPolicy,
    SelfPlayPolicy,
    SftPolicy,
)

# What every cell sets itself, by section: an override would give all cells the same seed, or another cell's files.
_ALWAYS = ("output_dir", "seed")
_DATA = ("data", "data.source")
SET_BY_CELLS: Mapping[str, tuple[str, ...]] = {
    "base": (*_ALWAYS, *_DATA),
    "sft": (*_ALWAYS, *_DATA),
    "dpr": (*_ALWAYS, "policy", "prompts", "prompts.source", "service_url", "service_pair"),
    "evaluate": ("output_dir", "policies", "held_out", "service_url", "service_pair"),
    "preview": (*_ALWAYS, "run", "sft", "references", "labelled"),
    "credit": (*_ALWAYS, *_DATA, "policy", "service_url", "service_pair", "service_pairs"),
}
OWN_ANSWERS = (*_ALWAYS, *_DATA, "policy", "held_out")
CONTINUED = (*_ALWAYS, *_DATA, "base_model", "scratch", "renderer")
MATCHED = ("epochs", "max_steps")
# Options of DPR that change how many tokens it computes with.
COSTS = ("steps", "prompts_per_step", "group_size", "max_new_tokens", "updates_per_batch", "candidates")
# Pictures of the study itself.
PICTURES = frozenset({"sweep", "boundary"})


def check_study(config: SweepConfig) -> None:
    """Raises ConfigError for overrides, grids, series and matches that would give wrong figures in silence."""
    for where, section, overrides in _sections(config):
        _check_not_set_by_cells(where, overrides, SET_BY_CELLS[section])
    for name, policy in config.policies.items():
        match policy:
            case DprPolicy():
                _check_not_set_by_cells(f"policies.{name}", {**policy.dpr, **policy.grid}, SET_BY_CELLS["dpr"])
            case SftPolicy():
                own = CONTINUED if policy.matched_flops is None else CONTINUED + MATCHED
                _check_not_set_by_cells(f"policies.{name}", {**policy.sft, **policy.grid}, own)
            case SelfPlayPolicy() | RftPolicy():
                _check_not_set_by_cells(f"policies.{name}", {**policy.options, **policy.grid}, OWN_ANSWERS)
            case _:
                pass
    _check_series(config)
    _check_matches(config)
    for name, regime in config.regimes.items():
        _check_reached(config, name, regime)
        _check_tuned(config, name)


def check_jobs(cell: Cell) -> None:
    """Raises ConfigError, before anything runs, if a job of the cell would refuse its configuration."""
    config, here, files = cell.config, cell.settings, cell.files
    folder: Overrides = {"output_dir": str(cell.folder)}
    data: Overrides = folder | {"data": {"source": str(files.train)}}
    recipe = config_path(config.sft_recipe)
    load_config(SftConfig, recipe, arguments(data | config.base | here.base))
    for policy in cell.policies.values():
        if isinstance(policy, SftPolicy):
            start: Overrides = {"base_model": str(cell.checkpoint("sft")), "scratch": None}
            kept = {key: value for key, value in sft_overrides(cell).items() if key.partition(".")[0] != "scratch"}
            load_config(SftConfig, recipe, arguments(data | kept | start | policy.sft))
    for name, policy in cell.policies.items():
        if isinstance(policy, SelfPlayPolicy):
            played: Overrides = data | {"policy": str(cell.checkpoint("sft"))}
            load_config(IrftConfig, config_path(policy.recipe), arguments(played | policy.options))
        if isinstance(policy, RftPolicy) and rft_config(cell, policy).policy_steps is None:
            raise ConfigError(f"policies.{name}: policy_steps is null, so rft would train no policy: set its options")
    if config.credit is not None:
        measured: Overrides = folder | {"data": {"source": str(files.test)}, "policy": str(cell.checkpoint("sft"))}
        overrides = measured | config.credit | here.credit
        load_config(CreditConfig, config_path("arithmetic_credit"), arguments(overrides))
    own: Overrides = folder | {
        "policies": evaluated_policies(cell),
        "held_out": str(files.test),
        "service_url": "http://127.0.0.1",
    }
    evaluated = load_config(
        EvaluateConfig, config_path("arithmetic_evaluate"), arguments(own | config.evaluate | here.evaluate)
    )
    if config.preview is not None:
        own = folder | {"run": str(cell.folder), "labelled": str(files.labelled)} | config.preview | here.preview
        checker = load_config(PreviewConfig, config_path("arithmetic_preview"), arguments(own)).checker
        if checker != evaluated.held_out_options.checker:
            raise ConfigError(
                f"regime {cell.regime}: preview finds answers by {checker}, evaluate by "
                f"{evaluated.held_out_options.checker}: set preview.checker and evaluate.held_out_options.checker alike"
            )


def _sections(config: SweepConfig) -> Iterator[tuple[str, str, Overrides]]:
    """Where overrides of jobs stand, for which job, and what they are."""
    places = {"": config, **{f"regimes.{name}.": regime for name, regime in config.regimes.items()}}
    for where, place in places.items():
        for section in SET_BY_CELLS:
            yield f"{where}{section}", section, getattr(place, section) or {}


def _check_not_set_by_cells(where: str, keys: Iterable[str], own: Iterable[str]) -> None:
    for key in keys:
        if any(key == one or (key.startswith(f"{one}.") and one not in {"data", "prompts"}) for one in own):
            raise ConfigError(f"{where}: {key} is set by the study, for each cell another value: leave it out")


def _check_series(config: SweepConfig) -> None:
    """Names of series and of their points: each a file or a folder of its own, and no two the same."""
    seen = set(config.policies)
    for name, series in config.series.items():
        if name in PICTURES or "." in name:
            raise ConfigError(f"series.{name}: this would not be a picture of its own: choose a name without dots")
        if config.policies[series.of].grid:
            raise ConfigError(
                f"series.{name}.of: {series.of} has a grid, but a series does not use the value that is chosen from "
                "it: give the series a policy with a fixed value"
            )
        for value in series.values:
            point = series_name(name, value)
            if point in seen:
                raise ConfigError(f"series.{name}: two policies would be called {point}: leave out or rename one")
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", point):
                raise ConfigError(f"series.{name}: {value!r} cannot be part of a folder's name: use a recipe per value")
            seen.add(point)
        if series.positions is None and not all(_is_number(value) for value in series.values):
            raise ConfigError(f"series.{name}: its values are no numbers: give positions, their places on the axis")


def _check_matches(config: SweepConfig) -> None:
    """FLOPs can be matched to DPR, and a KL to a policy that samples one answer."""
    for name, policy in config.policies.items():
        if isinstance(policy, SftPolicy) and policy.matched_flops is not None:
            other = config.policies.get(policy.matched_flops)
            if not isinstance(other, DprPolicy):
                raise ConfigError(f"policies.{name}.matched_flops: {policy.matched_flops} is no policy of kind dpr")
            if policy.grid and (costs := sorted(set(COSTS).intersection(other.grid))):
                raise ConfigError(
                    f"policies.{name} is tuned with the FLOPs of {policy.matched_flops}, whose grid changes them "
                    f"({costs[0]}): tune another option of one of them"
                )
        if isinstance(policy, MatchedKlPolicy):
            target = config.all_policies[policy.to]
            chooses = isinstance(target, SampledPolicy) and target.options.get("choose") is not None
            if isinstance(target, MatchedKlPolicy) or chooses or policy.options.get("choose") is not None:
                raise ConfigError(
                    f"policies.{name}: a KL can be matched between policies that sample one answer: {policy.to} must "
                    "be of another kind than matched_kl, and neither may choose among samples"
                )


def _check_reached(config: SweepConfig, name: str, regime: Regime) -> None:
    """No value of a grid or a series is overridden by the regime: all of them would be the same."""
    here = config.policies_of(name, config.all_policies)
    varied = {f"policies.{one}.grid": (one, key) for one, policy in config.policies.items() for key in policy.grid}
    varied |= {f"series.{one}": (series_name(one, s.values[0]), s.key) for one, s in config.series.items()}
    for where, (policy, key) in varied.items():
        if isinstance(here.get(policy), DprPolicy) and any(_touches(key, other) for other in regime.dpr):
            raise ConfigError(
                f"regimes.{name}.dpr: {key} would replace every value of {where}: leave it out, or give the regime "
                "other policies"
            )


def _check_tuned(config: SweepConfig, name: str) -> None:
    """Every grid of a regime is tuned in the regime whose values it uses."""
    other = config.tuned_in(name) or name
    tuned = config.policies_of(other, config.policies)
    for policy, options in config.policies_of(name, config.policies).items():
        if options.grid and policy not in tuned:
            raise ConfigError(
                f"regimes.{name}.tuned_as: {other} does not have {policy}, so no value of its grid is chosen: add it "
                "there, or leave out tuned_as"
            )


def _touches(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True
