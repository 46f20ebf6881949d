"""Job configurations and the command line: what they refuse, and the error messages."""

import subprocess
import sys
from pathlib import Path

import pytest
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.base import changed_keys, load_config
from dense_reward_trainer.configs.credit import CreditConfig
from dense_reward_trainer.configs.dpr import DprConfig, HeldOutOptions
from dense_reward_trainer.configs.preview import PreviewConfig
from dense_reward_trainer.configs.sample import SampleConfig
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.recipe_files import config_path, recipe_names
from pydantic import BaseModel, ValidationError

MINIMAL = "output_dir: out\ndata: {source: arithmetic}\nscratch: {}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(SftConfig, written(folder, text), overrides)
    return str(caught.value)


def test_a_file_gives_a_frozen_configuration_with_defaults(tmp_path: Path) -> None:
    config = load_config(SftConfig, written(tmp_path, MINIMAL + "learning_rate: 1e-3\n"))
    assert config.output_dir == Path("out")
    assert config.learning_rate == 0.001
    assert config.milestones == {"reference": 0.5}
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1


def test_overrides_are_yaml_values_applied_in_order_at_any_depth(tmp_path: Path) -> None:
    overrides = ["data.arithmetic.digits=2", "scratch.kv_heads=2", "milestones.early=0.25", "seed=1", "seed=2"]
    config = load_config(SftConfig, written(tmp_path, MINIMAL), overrides)
    assert config.data.arithmetic is not None
    assert config.data.arithmetic.digits == 2
    assert config.scratch is not None
    assert config.scratch.kv_heads == 2
    assert config.milestones == {"early": 0.25}
    assert config.seed == 2


def test_null_switches_an_option_off(tmp_path: Path) -> None:
    text = MINIMAL + "max_steps: 7\n"
    assert load_config(SftConfig, written(tmp_path, text), ["max_steps=null"]).max_steps is None


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert "unknown key learning_rat: did you mean learning_rate?" in refusal(tmp_path, MINIMAL + "learning_rat: 1\n")
    nested = refusal(tmp_path, MINIMAL, "data.arithmetic.digit=2", "scratch.head=2")
    assert "unknown key data.arithmetic.digit: did you mean data.arithmetic.digits?" in nested
    assert "unknown key scratch.head: did you mean scratch.heads?" in nested


def test_an_unknown_key_like_no_other_lists_what_is_known(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL, "lora.zzz=1")
    assert "unknown key lora.zzz: known keys: alpha, dropout, quantise, r, target_modules" in message


@pytest.mark.parametrize(
    ("text", "overrides", "reason"),
    [
        (MINIMAL, ["batch_size=0"], "batch_size: Input should be greater than or equal to 1"),
        (MINIMAL, ["milestones.reference=1.5"], "milestones.reference: Input should be less than 1"),
        (MINIMAL, ["milestones.base=-0.1"], "milestones.base: Input should be greater than or equal to 0"),
        (MINIMAL, ["milestones.sft=0.5"], "a milestone cannot be called sft"),
        (MINIMAL, ["milestones={../up: 0.5}"], "milestones.../up"),
        (MINIMAL, ["scratch.heads=3"], "hidden_size 128 must be a multiple of twice the 3 heads"),
        (MINIMAL, ["base_model=some/model"], "give either base_model or scratch"),
        (MINIMAL, ["scratch=null"], "give either base_model or scratch"),
        (MINIMAL, ["lora.r=4"], "lora needs a base_model"),
        (MINIMAL, ["seed"], "'seed' is not of the form key.sub=value"),
        (MINIMAL, ["seed=[1"], "the value is not valid YAML"),
        (MINIMAL, ["output_dir.sub=1"], "output_dir is 'out', which has no keys"),
        (MINIMAL + "seed: 1\nseed: 2\n", [], "the key 'seed' is given twice"),
        ("- a list\n", [], "must hold a mapping"),
        ("a: [1\n", [], "cannot be read as YAML"),
    ],
)
def test_a_refusal_names_the_fault(tmp_path: Path, text: str, overrides: list[str], reason: str) -> None:
    assert reason in refusal(tmp_path, text, *overrides)


def test_a_refusal_does_not_show_the_value_that_may_be_a_secret(tmp_path: Path) -> None:
    assert "hunter2" not in refusal(tmp_path, MINIMAL, "batch_size=hunter2")


def test_a_configuration_is_found_by_path_or_by_the_name_of_a_recipe(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    assert config_path(str(path)) == path
    assert config_path("arithmetic_sft").name == "arithmetic_sft.yaml"
    with pytest.raises(ConfigError, match=r"no such file, and no recipe of that name. Recipes: .*arithmetic_sft"):
        config_path("no_such_recipe")
    assert "arithmetic_sft_tiny" in recipe_names()


def test_only_changes_of_what_matters_are_named() -> None:
    started = {"seed": 0, "data": {"source": "a", "limit": None}, "threads": 2}
    now = {"seed": 0, "data": {"source": "b", "limit": None}, "threads": 4, "new": 1}
    assert changed_keys(started, now, frozenset({"threads"})) == ["data.source", "new"]
    assert changed_keys(started, started, frozenset()) == []


def test_a_key_below_any_name_may_change() -> None:
    started = {"regimes": {"one": {"seeds": [1], "task": "a"}}, "seeds": [1]}
    now = {"regimes": {"one": {"seeds": [1, 2], "task": "b"}}, "seeds": [1, 2]}
    assert changed_keys(started, now, frozenset({"regimes.*.seeds"})) == ["regimes.one.task", "seeds"]


def test_a_mistyped_override_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "arithmetic_sft_tiny", "batchsize=4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_option_is_refused_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--skip-bda", "seed=1"], ["seed=1", "--skip-bda"]):
        with pytest.raises(SystemExit) as stopped:
            main(["sft", "arithmetic_sft_tiny", *arguments])
        assert stopped.value.code == 2
        assert "unrecognized arguments: --skip-bda" in capsys.readouterr().err


def test_evaluation_leaves_nothing_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "arithmetic_evaluate_tiny", "--skip-bad"])
    assert "unrecognized arguments: --skip-bad" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip().count(".") >= 1


def test_a_mistake_is_told_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from dense_reward_trainer.cli import main; code = main(['sft', 'no_such_recipe']); "
        "print(code, 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


@pytest.mark.parametrize("config", [SftConfig, DprConfig, HeldOutOptions, CreditConfig, PreviewConfig, SampleConfig])
def test_a_seed_that_some_library_does_not_take_is_refused(config: type[BaseModel]) -> None:
    for seed, wrong in {-1: True, 0: False, 2**32 - 1: False, 2**32: True}.items():
        with pytest.raises(ValidationError) as caught:
            config.model_validate({"seed": seed, "no such key": 0})
        assert (("seed",) in [fault["loc"] for fault in caught.value.errors()]) == wrong
