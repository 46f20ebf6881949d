"""Every recipe that ships is a valid configuration of its job, and every recipe for big machines has a tiny twin."""

import importlib

import pytest
from dense_reward_trainer.cli import JOBS
from dense_reward_trainer.config import JobConfig, SftConfig, config_path, load_config, recipe_names


def config_class(recipe: str) -> type[JobConfig]:
    """A recipe's name holds its job's."""
    (job,) = JOBS.keys() & set(recipe.split("_"))
    module, _, name = JOBS[job].config.partition(":")
    cls: type[JobConfig] = getattr(importlib.import_module(module), name)
    return cls


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_a_valid_configuration_of_its_job(recipe: str) -> None:
    load_config(config_class(recipe), config_path(recipe))


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if "sft" in name and not name.endswith("_tiny")])
def test_a_recipe_of_sft_has_a_tiny_twin_with_the_same_kind_of_start(recipe: str) -> None:
    big, twin = (load_config(SftConfig, config_path(name)) for name in (recipe, f"{recipe}_tiny"))
    assert (twin.scratch is None) == (big.scratch is None)
    assert (twin.lora is None) == (big.lora is None)
    assert (twin.precision, twin.gradient_checkpointing) == (big.precision, big.gradient_checkpointing)
    assert twin.device == "cpu"


def test_no_two_recipes_share_a_run_folder() -> None:
    folders = [load_config(config_class(name), config_path(name)).output_dir for name in recipe_names()]
    assert len(set(folders)) == len(folders)


def test_the_demonstration_leaves_its_pair_where_the_readme_says() -> None:
    config = load_config(SftConfig, config_path("arithmetic_sft"))
    assert str(config.output_dir) == "runs/demo"
    assert config.milestones == {"reference": 0.5}
