"""docs/large_scale.md: its commands are accepted by the programs and recipes that they name, its costs are computed."""

import importlib
import re
import shlex

import pytest
from dense_reward import cli as service
from dense_reward.settings import Settings
from dense_reward_trainer import commands, job_runner
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.studies.regimes.config import SweepConfig
from dense_reward_trainer.studies.regimes.study import check_cells

from bench.evaluation.large_scale import MODELS, PAGE, blocks
from bench.tables import block_of

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\b(dense-reward(?:-train)?) ([^&)\n]*)")
CODE = "\n".join(BLOCK.findall(PAGE.read_text("utf-8")))


def calls_of(program: str) -> list[list[str]]:
    """The arguments of each call of a program on the page, for each size of model; comments are left out."""
    calls = [words for name, words in COMMAND.findall(re.sub(r" +# .*", "", CODE)) if name == program]
    return [shlex.split(words.replace("$SIZE", size)) for words in calls for size in MODELS if words.strip()]


@pytest.mark.parametrize("arguments", calls_of("dense-reward-train"), ids=" ".join)
def test_a_command_of_the_trainer_resolves(arguments: list[str]) -> None:
    options = commands.parsed(arguments)
    if options.job == commands.REPORT:
        return
    config = job_runner._resolved(options.job, options.config, options.overrides)
    importlib.import_module(commands.JOBS[options.job].module)
    if isinstance(config, SweepConfig):
        check_cells(config)
    if options.launch is not None:
        job_runner._print_launch(options, options.overrides)


@pytest.mark.parametrize("arguments", calls_of("dense-reward"), ids=" ".join)
def test_a_command_of_the_service_is_accepted(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        service.main([*arguments, "--help"])
    assert done.value.code == 0


def test_variables_of_the_page_are_settings() -> None:
    names = re.findall(r"DENSE_REWARD_(\w+)=", CODE)
    assert names
    assert {name.lower() for name in names} <= Settings.model_fields.keys()


def test_the_recipe_has_the_shares_seeds_and_references_of_the_page() -> None:
    config = load_config(SweepConfig, config_path("large_scale_sweep"))
    shares = {name: one.task.sampled_share for name, one in config.regimes.items() if one.task.name == "files"}
    reported = {name: share for name, share in shares.items() if not name.endswith("tuning")}
    assert reported == {f"{data}_{share}": share / 100 for data in ("gsm8k", "math") for share in (0, 30, 50, 70)}
    assert config.seeds == (20, 21, 22, 23, 24)
    assert {len(values) for policy in config.policies.values() for values in policy.grid.values()} == {4}


@pytest.mark.parametrize("name", blocks())
def test_a_table_of_costs_is_what_its_command_writes(name: str) -> None:
    assert block_of(PAGE, name) == blocks()[name].strip(), "run `python -m bench.evaluation.large_scale`"


def test_the_sizes_are_those_that_the_models_have() -> None:
    published = {"0.5B": 494_032_768, "1.5B": 1_543_714_304, "7B": 7_615_616_512}
    assert {name: model.parameters for name, model in MODELS.items()} == published
