"""The last line of a job: what is finished, and the next command, which can be pasted into a shell."""

import shlex
from pathlib import Path

import pytest
import yaml
from dense_reward_trainer.configs.base import Config, load_config
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.configs.preview import PreviewConfig
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.jobs.dpr_policy import last_line
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.runs.next_step import again, evaluate, finished, job, report_page, serve, sft_run_of
from shell_command import next_commands, resolve


def typed(kind: type[Config], *words: str) -> Config:
    """The configuration of a command line."""
    return load_config(kind, config_path(words[0]), words[1:]).typed_as(words)


def test_the_line_has_the_result_and_the_next_command() -> None:
    assert finished(Path("runs/a"), serve(Path("runs/a"), ["base"])) == (
        "finished: runs/a; next: dense-reward serve --run runs/a"
    )
    assert finished(Path("runs/a")) == "finished: runs/a"
    assert resolve(report_page(Path("runs/a"))).output == Path("runs/a/report.html")


def test_a_run_without_a_reference_is_served_with_one_that_the_user_names() -> None:
    assert serve(Path("runs/a"), ()) == (
        "dense-reward serve --sft runs/a/checkpoints/sft --reference EARLIER_CHECKPOINT"
    )


def test_paths_with_spaces_and_mappings_are_one_word_each() -> None:
    command = evaluate({"start": Path("my runs/a"), "dpr": Path("b")}, Path("my held out"), {"output_dir": Path("e")})
    assert "policies={start: my runs/a, dpr: b}" in shlex.split(command)
    found = resolve(command)
    assert found.held_out == Path("my held out")
    assert found.policies["start"].checkpoint == Path("my runs/a")
    assert shlex.split(serve(Path("my runs"), ["base"]))[-1] == "my runs"


def test_a_job_starts_from_the_recipe_of_the_run_and_names_what_differs() -> None:
    keys = {"policy": Path("runs/demo/checkpoints/sft"), "service_pair": "early", "output_dir": Path("runs/demo_dpr")}
    command = job("dpr", DprConfig, keys, default="dpr_full", match="policy")
    assert command.startswith("dense-reward-train dpr demo_dpr")
    assert resolve(command).policy == keys["policy"]
    keys["policy"] = Path("runs/mine/checkpoints/sft")
    command = job("dpr", DprConfig, keys, default="dpr_full", match="policy")
    assert command.startswith("dense-reward-train dpr dpr_full policy=runs/mine/checkpoints/sft service_pair=early ")
    assert resolve(command).service_pair == "early"


def test_a_command_is_typed_again_with_other_keys() -> None:
    config = typed(PreviewConfig, "arithmetic_preview", "prompts=20", "seed=3")
    command = again("preview", config, {"prompts": 40, "output_dir": Path("more")})
    assert command == "dense-reward-train preview arithmetic_preview seed=3 prompts=40 output_dir=more"
    assert resolve(command).prompts == 40
    assert again("preview", load_config(PreviewConfig, config_path("preview_full")), {}).endswith(" CONFIG")


def test_secrets_that_were_typed_are_not_repeated() -> None:
    config = typed(DprConfig, "dpr_full", "service_url=http://user:secret@host:1")
    assert "secret" not in again("dpr", config, {"steps": 3})
    assert "secret" not in last_line(config)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (DprConfig, ("arithmetic_dpr",)),
        (DprConfig, ("dpr_full", "held_out=null", "policy=elsewhere/final", "output_dir=my runs/o")),
    ],
)
def test_the_policy_of_dpr_is_compared_with_its_start(kind: type[DprConfig], words: tuple[str, ...]) -> None:
    config = typed(kind, *words)
    (command,) = next_commands(last_line(config))
    policies = resolve(command).policies
    assert policies["start"].checkpoint == config.policy
    assert policies["dpr"].checkpoint == config.output_dir / "checkpoints" / "policy"


def test_the_run_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "sft"
    assert sft_run_of(checkpoint) is None
    values = load_config(SftConfig, config_path("arithmetic_sft")).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    run, found = sft_run_of(checkpoint) or pytest.fail("not found")
    assert (run, found["data"]) == (tmp_path, values["data"])
