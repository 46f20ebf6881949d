"""The printed launch commands, and that torchrun and accelerate accept them with the shipped files."""

import shlex
from argparse import Namespace

import pytest
from dense_reward_trainer.cli import main
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.launch import STRATEGIES, Cluster, Strategy, launch_command, launch_file


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["sft", *arguments]) == 0
    return capsys.readouterr().out.strip()


def test_one_gpu_needs_no_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "sft_full", "data.source=my file.jsonl", "--launch", "1") == (
        "dense-reward-train sft sft_full 'data.source=my file.jsonl'"
    )


def test_eight_gpus_and_two_machines_run_under_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "sft_full", "--skip-bad", "--launch", "8") == (
        "torchrun --standalone --nproc_per_node 8 -m dense_reward_trainer.cli sft sft_full data.skip_bad=true"
    )
    assert printed(capsys, "sft_full", "--launch", "2x8") == (
        "torchrun --nnodes 2 --node_rank $MACHINE --nproc_per_node 8 --master_addr $MAIN_HOST --master_port 29500 "
        "-m dense_reward_trainer.cli sft sft_full"
    )


def test_dpr_is_launched_through_trl_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpr", "dpr_full", "engine=trl", "--launch", "8"]) == 0
    assert capsys.readouterr().out.strip() == (
        "torchrun --standalone --nproc_per_node 8 -m dense_reward_trainer.cli dpr dpr_full engine=trl"
    )
    assert main(["dpr", "dpr_full", "--launch", "8"]) == 2
    assert "engine own runs in one process: add engine=trl" in capsys.readouterr().err


def accelerate_arguments(strategy: Strategy, gpus: str) -> Namespace:
    """What accelerate itself reads from a printed command."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # noqa: PLC0415

    command = launch_command(Cluster.of(gpus), strategy, ["sft", "sft_full"])
    words = shlex.split(command.replace("$MACHINE", "1").replace("$MAIN_HOST", "host"))
    assert words[:2] == ["accelerate", "launch"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert isinstance(arguments, Namespace)
    arguments.deepspeed_fields_from_accelerate_config = ""  # accelerate sets it in between
    return arguments


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["8", "2x8"])
def test_accelerate_reads_fsdp2_and_zero3_as_they_are_meant(gpus: str) -> None:
    for strategy, kind in (("fsdp2", "use_fsdp"), ("zero3", "use_deepspeed")):
        read = accelerate_arguments(strategy, gpus)  # type: ignore[arg-type]
        assert getattr(read, kind) is True
        assert (read.num_processes, read.num_machines) == ((16, 2) if gpus == "2x8" else (8, 1))
        assert (read.module, read.training_script) == (True, "dense_reward_trainer.cli")
        assert read.training_script_args == ["sft", "sft_full"]
        assert read.mixed_precision == "no"
        if gpus == "2x8":
            assert (read.machine_rank, read.main_process_ip, read.main_process_port) == (1, "host", 29500)


@pytest.mark.slow
def test_the_environment_that_accelerate_makes_is_one_that_sft_accepts() -> None:
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env  # noqa: PLC0415

    fsdp = prepare_multi_gpu_env(accelerate_arguments("fsdp2", "8"))
    assert fsdp["ACCELERATE_USE_FSDP"].lower() == "true"
    assert fsdp["FSDP_VERSION"] == "2"
    assert fsdp["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "false"
    _, zero = prepare_deepspeed_cmd_env(accelerate_arguments("zero3", "8"))
    assert zero["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert zero["ACCELERATE_DEEPSPEED_ZERO3_INIT"].lower() == "false"
    assert zero["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"


@pytest.mark.parametrize("text", ["", "0", "x8", "8x", "2x0", "-1", "2x8x2", "many"])
def test_a_number_of_gpus_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 2x8"):
        Cluster.of(text)


def test_bad_requests_are_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "sft_full", "--launch", "1", "--strategy", "zero3"]) == 2
    assert "shares the weights among GPUs" in capsys.readouterr().err
    assert main(["sft", "sft_full", "learning_rat=1", "--launch", "8"]) == 2
    assert "did you mean learning_rate" in capsys.readouterr().err


def test_each_strategy_has_a_file() -> None:
    assert all(launch_file(strategy).is_file() for strategy in STRATEGIES)
