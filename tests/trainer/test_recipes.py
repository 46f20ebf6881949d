"""Every shipped recipe is a valid configuration of its job, and every recipe for large machines has a tiny version."""

import importlib
import re
from pathlib import Path

import pytest
from dense_reward_trainer.commands import JOBS
from dense_reward_trainer.configs.base import Config, JobConfig, load_config
from dense_reward_trainer.configs.benchmark import LeaderboardConfig
from dense_reward_trainer.configs.credit import CreditConfig
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.configs.evaluate import EvaluateConfig
from dense_reward_trainer.configs.irft import IrftConfig
from dense_reward_trainer.configs.preview import PreviewConfig
from dense_reward_trainer.configs.rft import RftConfig
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.recipe_files import config_path, recipe_names


def config_class(recipe: str) -> type[JobConfig]:
    """The configuration class of a recipe; its name contains that of its job, but for the study `sweep methods`."""
    (job,) = {"sweep"} if recipe == "methods" else JOBS.keys() & set(recipe.split("_"))
    module, _, name = JOBS[job].config.partition(":")
    cls: type[JobConfig] = getattr(importlib.import_module(module), name)
    return cls


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_a_valid_configuration_of_its_job(recipe: str) -> None:
    load_config(config_class(recipe), config_path(recipe))


# The base of a QLoRA run is quantised on a GPU; its tiny twin is that of LoRA. The demo is small itself.
NO_TWIN = {"sft_qlora", "demo_base_sft", "demo_sft"}


@pytest.mark.parametrize(
    "recipe", [name for name in recipe_names() if "sft" in name and not name.endswith("_tiny") and name not in NO_TWIN]
)
def test_a_recipe_of_sft_has_a_tiny_twin_with_the_same_kind_of_start(recipe: str) -> None:
    full, tiny = (load_config(SftConfig, config_path(name)) for name in (recipe, f"{recipe}_tiny"))
    assert (tiny.scratch is None) == (full.scratch is None)
    assert (tiny.lora is None) == (full.lora is None)
    assert (tiny.precision, tiny.gradient_checkpointing) == (full.precision, full.gradient_checkpointing)
    assert tiny.device == "cpu"


def test_no_two_recipes_share_a_run_folder() -> None:
    folders = [load_config(config_class(name), config_path(name)).output_dir for name in recipe_names()]
    assert len(set(folders)) == len(folders)


def test_the_demonstration_leaves_its_pair_where_the_readme_says() -> None:
    base, config = (load_config(SftConfig, config_path(name)) for name in ("demo_base_sft", "demo_sft"))
    assert str(config.output_dir) == "runs/demo"
    assert config.milestones == {"base": 0.0, "early": 0.1, "reference": 0.5}
    assert config.base_model == f"{base.output_dir}/checkpoints/sft"


@pytest.mark.parametrize("recipe", ["sft_full", "sft_full_tiny", "sft_lora", "sft_lora_tiny", "sft_qlora"])
def test_a_recipe_for_a_real_model_keeps_its_base_an_early_and_a_half_way_reference(recipe: str) -> None:
    config = load_config(SftConfig, config_path(recipe))
    assert config.milestones == {"base": 0.0, "early": 0.1, "reference": 0.5}


def resolved(kind: type[Config]) -> dict[str, Config]:
    """The recipes of one job, by name."""
    return {
        name: load_config(kind, config_path(name)) for name in recipe_names() if issubclass(kind, config_class(name))
    }


def written() -> set[Path]:
    """All checkpoints and held-out files that the recipes write."""
    paths = {config.output_dir / "checkpoints" / "policy" for config in resolved(DprConfig).values()}
    for config in resolved(SftConfig).values():
        paths |= {config.output_dir / "checkpoints" / name for name in ("sft", *config.milestones)}
        paths.add(config.output_dir / "held_out.jsonl")
    return paths


def sft_run_of(path: Path) -> SftConfig:
    """The SFT recipe that writes this checkpoint or held-out file."""
    (config,) = (config for config in resolved(SftConfig).values() if path.is_relative_to(config.output_dir))
    return config


@pytest.mark.parametrize("recipe", resolved(DprConfig))
def test_a_recipe_of_dpr_takes_up_an_sft_recipe_with_its_data_and_its_split(recipe: str) -> None:
    config = resolved(DprConfig)[recipe]
    assert {config.policy, config.held_out} <= written()
    assert config.policy.name == "sft"
    run = sft_run_of(config.policy)
    assert config.held_out == run.output_dir / "held_out.jsonl"
    assert config.prompts == run.data


@pytest.mark.parametrize("recipe", resolved(IrftConfig))
def test_a_recipe_of_irft_starts_from_an_sft_recipe_with_its_data_and_its_split(recipe: str) -> None:
    config = resolved(IrftConfig)[recipe]
    assert config.policy in written()
    assert config.policy.name == "sft"
    assert config.data.model_copy(update={"skip_bad": False}) == sft_run_of(config.policy).data


@pytest.mark.parametrize("recipe", resolved(RftConfig))
def test_a_recipe_of_rft_takes_up_an_sft_recipe_with_its_data_and_its_split(recipe: str) -> None:
    config = resolved(RftConfig)[recipe]
    assert {config.policy, config.held_out} <= written()
    assert config.policy.name == "sft"
    run = sft_run_of(config.policy)
    assert config.held_out == run.output_dir / "held_out.jsonl"
    assert config.data == run.data


@pytest.mark.parametrize("recipe", resolved(EvaluateConfig))
def test_a_recipe_of_evaluate_measures_what_other_recipes_leave(recipe: str) -> None:
    config = resolved(EvaluateConfig)[recipe]
    folders = [policy.checkpoint for policy in config.policies.values()]
    assert {config.held_out, *folders} <= written()
    starts = {dpr.output_dir: dpr.policy for dpr in resolved(DprConfig).values()}
    for folder in folders:
        first = starts.get(folder.parent.parent, folder)
        assert sft_run_of(first) == sft_run_of(config.held_out)


@pytest.mark.parametrize("recipe", resolved(LeaderboardConfig))
def test_a_recipe_of_leaderboard_measures_what_other_recipes_leave(recipe: str) -> None:
    assert set(resolved(LeaderboardConfig)[recipe].policies.values()) <= written()


@pytest.mark.parametrize("recipe", resolved(CreditConfig))
def test_a_recipe_of_credit_looks_at_answers_that_its_sft_recipe_left_out(recipe: str) -> None:
    config, source = resolved(CreditConfig)[recipe], Path(resolved(CreditConfig)[recipe].data.source)
    run = sft_run_of(source) if source in written() else resolved(SftConfig)[recipe.replace("credit", "sft")]
    if config.policy is not None:
        assert config.policy in written()
        assert sft_run_of(config.policy) == run
    if source in written():
        return
    assert run.data.source == config.data.source
    assert config.data.last is not None
    assert config.data.last <= run.data.skip_last
    assert config.data.strip_annotations == run.data.strip_annotations


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_pair_that_a_recipe_says_to_serve_is_one_that_a_recipe_leaves(recipe: str) -> None:
    text = config_path(recipe).read_text().replace("\n#", " ")
    for sft, reference in re.findall(r"serve --sft (\S+)\s+--reference (\S+)", text):
        assert {Path(sft), Path(reference)} <= written()
        assert sft_run_of(Path(sft)) == sft_run_of(Path(reference))
    for folder in re.findall(r"serve --run (\S+)", text):
        assert Path(folder) / "checkpoints" / "sft" in written()
    if "Needs" in text:
        assert "dense-reward serve --sft" in text or "dense-reward serve --run" in text


@pytest.mark.parametrize("recipe", resolved(PreviewConfig))
def test_a_recipe_of_preview_reads_an_sft_recipes_run_and_what_it_held_out(recipe: str) -> None:
    config = resolved(PreviewConfig)[recipe]
    run = sft_run_of(config.labelled)
    assert config.run == run.output_dir
    assert config.labelled == run.output_dir / "held_out.jsonl"
