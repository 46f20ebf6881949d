"""SFT in two processes is SFT in one: losses, weights, checkpoints; also after a kill, and with sharded weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import killed_job
import pytest
import sharded_training
import torch
from dense_reward.manifest import Manifest, load_manifest, verify_files
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.sft import sharding
from safetensors.torch import load_file
from served_pair import environment, free_port
from transformers.integrations import deepspeed

pytestmark = pytest.mark.slow

RUN = (
    "threads=1",
    "data={source: arithmetic, held_out_fraction: 0, arithmetic: {demonstrations: 80, digits: 2}}",
    "eval_every_steps=null",
    "log_every_steps=1",
    "save_every_steps=4",
    "group_by_length=true",
    "milestones={base: 0, reference: 0.5}",
)


def two_processes(*command: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    done = subprocess.run(
        [*launcher, str(free_port()), *command],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr or "ChildFailedError" in done.stderr, done.stderr
    return done


def job(folder: Path, *overrides: str) -> list[str]:
    return ["sft", "arithmetic_sft_tiny", f"output_dir={folder}", *RUN, *overrides]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], Manifest]:
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    return dict(load_file(folder / "model.safetensors")), manifest


def assert_same_checkpoints(found: Path, expected: Path, atol: float) -> None:
    """The same files, keys, shapes and weights, and manifests that differ in hashes and run id only."""
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        files = [sorted(path.name for path in folder.iterdir()) for folder in (found / name, expected / name)]
        assert files[0] == files[1]
        (weights, manifest), (others, other) = (checkpoint(folder / name) for folder in (found, expected))
        assert weights.keys() == others.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(weight, others[key], rtol=0, atol=atol, msg=f"{name}: {key}")
        differ = {"run_id", "files", "probe", "weights_sha256", "content_sha256", "created_at"}
        assert manifest.model_dump(exclude=differ) == other.model_dump(exclude=differ)


def test_two_processes_train_what_one_does_and_so_does_a_run_that_lost_one_of_them(tmp_path: Path) -> None:
    assert main(job(tmp_path / "one")) == 0
    program = ("-m", "dense_reward_trainer.cli")
    done = two_processes(*program, *job(tmp_path / "two", "batch_size=4"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished: ") == 1, "only one process reports"
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert_same_checkpoints(tmp_path / "two" / "checkpoints", tmp_path / "one" / "checkpoints", atol=1e-4)

    command = killed_job.command(signal.SIGKILL, 10, *job(tmp_path / "killed", "batch_size=4"))
    killed = two_processes(*command[1:])
    assert killed.returncode != 0
    assert not (tmp_path / "killed" / "checkpoints" / "sft").exists(), "ended in the middle"
    resumed = two_processes(*program, *job(tmp_path / "killed", "batch_size=4"))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 8" in resumed.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "two")
    assert_same_checkpoints(tmp_path / "killed" / "checkpoints", tmp_path / "two" / "checkpoints", atol=0.0)

    refused = two_processes(*program, *job(tmp_path / "two", "batch_size=4", "seed=1"))
    assert refused.returncode != 0
    assert refused.stderr.count("different configuration (seed: 0 -> 1)") == 1


@pytest.mark.parametrize("typo", ["batchsize=4", "--bachsize"], ids=["key", "flag"])
def test_two_processes_report_a_typo_once(typo: str, tmp_path: Path) -> None:
    refused = two_processes("-m", "dense_reward_trainer.cli", *job(tmp_path / "run", typo))
    assert refused.returncode != 0
    assert refused.stderr.count("error: ") == 1, refused.stderr
    assert not (tmp_path / "run").exists()


def test_shards_of_two_processes_are_written_once_and_whole(tmp_path: Path) -> None:
    done = two_processes(sharded_training.__file__, str(tmp_path))
    assert done.returncode == 0, done.stderr
    sharded, plain = (tmp_path / name / "checkpoints" for name in ("sharded", "plain"))
    assert_same_checkpoints(sharded, plain, atol=1e-4)
    configs = [json.loads((folder / "sft" / "config.json").read_text()) for folder in (sharded, plain)]
    assert configs[0] == configs[1]


CPU = SimpleNamespace(world_size=1, n_gpu=0, device=torch.device("cpu"))
GPU = SimpleNamespace(world_size=1, n_gpu=1, device=torch.device("cuda"))
GPUS = SimpleNamespace(world_size=1, n_gpu=8, device=torch.device("cuda"))
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        (CPU, {"WORLD_SIZE": "2"}, "started 2 processes, but each of them would train alone"),
        (GPUS, {}, "one process sees 8 GPUs"),
        (CPU, {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "asked for several processes"),
        (CPU, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "asks for bfloat16, but precision is float32"),
        (CPU, {"ACCELERATE_MIXED_PRECISION": "fp8"}, "asks for another, but precision is float32"),
        (CPU, FSDP, "never becomes active on a CPU"),
        (GPU, {"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        (GPU, FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
    ],
    ids=["alone", "data-parallel", "accelerate-cpu", "bf16", "fp8", "fsdp-cpu", "fsdp1", "meta-device"],
)
def test_processes_that_are_not_what_was_asked_for_are_refused(
    arguments: SimpleNamespace, variables: dict[str, str], reason: str
) -> None:
    config = load_config(SftConfig, config_path("arithmetic_sft_tiny"))
    with pytest.raises(ConfigError, match=reason):
        sharding.check_processes(config, arguments, variables)


@pytest.mark.parametrize("variables", [{}, {"ACCELERATE_MIXED_PRECISION": "no"}, FSDP], ids=["none", "no", "fsdp2"])
def test_what_was_asked_for_is_accepted(variables: dict[str, str]) -> None:
    config = load_config(SftConfig, config_path("arithmetic_sft_tiny"))
    sharding.check_processes(config, GPU, variables)


def test_a_quantised_base_is_not_sharded() -> None:
    config = load_config(SftConfig, config_path("sft_lora_tiny"), ["lora.quantise=4bit", "precision=float32"])
    with pytest.raises(ConfigError, match="a quantised base cannot be sharded"):
        sharding.check_processes(config, GPU, FSDP)


def test_a_model_that_fsdp_left_whole_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    sharding.check_sharded(model)
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_FSDP", "true")
    with pytest.raises(JobError, match="the model is not sharded"):
        sharding.check_sharded(model)


def test_models_are_loaded_whole_although_zero3_would_share_them() -> None:
    class Zero3:
        def is_zero3(self) -> bool:
            return True

    asked = Zero3()
    deepspeed.set_hf_deepspeed_config(asked)
    try:
        with sharding.loads_whole_models():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled(), "the trainer needs to know"
    finally:
        deepspeed.unset_hf_deepspeed_config()
    with sharding.loads_whole_models():
        assert not deepspeed.is_deepspeed_zero3_enabled()


def test_processes_that_see_different_run_folders_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(seen: list[object], own: object) -> None:
        seen[:] = [own, (0, False)]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    sharding.check_same_run_folder(0, finished=False)
    with pytest.raises(ConfigError, match="a folder that all machines share"):
        sharding.check_same_run_folder(8, finished=False)
