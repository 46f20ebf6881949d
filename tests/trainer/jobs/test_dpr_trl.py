"""DPR through TRL as users run it: the command, a real service, a kill, two processes, and options that do not fit."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import killed_job
import numpy as np
import pytest
import yaml
from dense_reward.manifest import load_manifest, verify_files
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.jobs.dpr_trl import PolicyTrainer, dense_reward_of, grpo_arguments
from dense_reward_trainer.rl.policy import load_policy
from pydantic import ValidationError
from safetensors.torch import load_file
from served_pair import DATA, ServedPair, environment, free_port
from transformers import AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]
STEPS, UPDATES = 3, 2


def values_of(served: ServedPair, run: Path) -> dict[str, object]:
    return {
        "output_dir": str(run),
        "policy": str(served.folder / "sft"),
        "service_url": served.url,
        "prompts": DATA,
        "engine": "trl",
        "steps": STEPS,
        "prompts_per_step": 4,
        "group_size": 3,
        "updates_per_batch": UPDATES,
        "max_new_tokens": 12,
        "learning_rate": 1e-3,
        "save_every": 1,
        "device": "cpu",
        "threads": 1,
    }


def write_config(served: ServedPair, run: Path) -> str:
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values_of(served, run)))
    return str(path)


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_policy_and_a_killed_one_ends_with_the_same(served: ServedPair, tmp_path: Path) -> None:
    assert main(["dpr", write_config(served, tmp_path / "run")]) == 0
    policy = tmp_path / "run" / "checkpoints" / "policy"
    manifest = load_manifest(policy)
    verify_files(policy, manifest)
    assert (manifest.role, manifest.tokenizer_sha256) == (
        "policy",
        load_manifest(served.folder / "sft").tokenizer_sha256,
    )
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [*range(1, STEPS * UPDATES + 1)]
    assert all("dense_reward/kl_to_sft" in line for line in logged[::UPDATES])
    assert (tmp_path / "run" / "dpr.png").is_file()
    assert not (tmp_path / "run" / "resume").exists()
    start, trained = (load_file(folder / "model.safetensors") for folder in (served.folder / "sft", policy))
    assert max(float((trained[key] - start[key]).abs().max()) for key in start) > 1e-4

    config = write_config(served, tmp_path / "killed")
    killed = subprocess.run(
        killed_job.command(signal.SIGKILL, 3, "dpr", config),
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert main(["dpr", config, "seed=1"]) == 2, "another seed is another run"
    assert main(["dpr", config]) == 0
    again = tmp_path / "killed" / "checkpoints" / "policy" / "model.safetensors"
    assert again.read_bytes() == (policy / "model.safetensors").read_bytes()
    assert [line["step"] for line in lines(tmp_path / "killed")] == [line["step"] for line in logged]


def test_two_processes_write_one_policy(served: ServedPair, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [*launcher, "-m", "dense_reward_trainer.cli", "dpr", write_config(served, tmp_path / "two"), "steps=1"]
    done = subprocess.run(
        [sys.executable, *command],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("finished: ") == 1, "only one process reports"
    assert "processes: 2" in done.stderr
    policy = tmp_path / "two" / "checkpoints" / "policy"
    verify_files(policy, load_manifest(policy))


def test_only_the_end_of_turn_ends_an_answer_as_in_the_own_engine(served: ServedPair, tmp_path: Path) -> None:
    config = DprConfig.model_validate(values_of(served, tmp_path))
    checkpoint = load_policy(config.policy, precision="float32", device="cpu")
    end = checkpoint.policy.end_of_turn_id
    checkpoint.policy.model.generation_config.eos_token_id = [end, end + 1]
    tokenizer = AutoTokenizer.from_pretrained(config.policy)
    prompt = np.array([20, 21], dtype=np.int32)
    trainer = PolicyTrainer(config, grpo_arguments(config, 1), checkpoint, tokenizer, [prompt])
    trainer.close()
    assert trainer.eos_token_ids == trainer.generation_config.eos_token_id == [end]
    assert trainer.generation_kwargs["eos_token_id"] == [end]


def test_a_launcher_that_asks_for_another_precision_is_refused(
    served: ServedPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["dpr", write_config(served, tmp_path / "run")]) == 2
    assert "the launcher asks for bfloat16, but precision is float32" in capsys.readouterr().err


NOT_OF_TRL: dict[str, tuple[dict[str, object], str]] = {
    "one response": ({"group_size": 1, "baseline": "none"}, "engine trl needs group_size of at least 2"),
    "candidates": ({"candidates": 4}, "candidates 0: its loss knows only the sampled ids"),
    "a KL in the loss": ({"kl_penalty": "loss_k2"}, "needs kl_penalty reward"),
    "a KL target": ({"kl_target": 1.0}, "needs kl_target null"),
    "an average": ({"average_decay": 0.9}, "needs average_decay null"),
    "float64": ({"precision": "float64"}, "precision float32 or bfloat16"),
    "options of the other": ({"engine": "own", "trl": {"batch_size": 2}}, "belong to engine trl"),
}


@pytest.mark.parametrize(("changes", "complaint"), NOT_OF_TRL.values(), ids=NOT_OF_TRL)
def test_options_that_trl_does_not_have_are_refused(
    changes: dict[str, object], complaint: str, served: ServedPair, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        DprConfig.model_validate(values_of(served, tmp_path) | changes)


def test_responses_are_divided_among_processes_by_whole_groups(served: ServedPair, tmp_path: Path) -> None:
    config = DprConfig.model_validate(values_of(served, tmp_path) | {"trl": {"batch_size": 2}, "kl_coefficient": 0.3})
    arguments = grpo_arguments(config, 2)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 3)
    assert (arguments.max_steps, arguments.save_steps, arguments.beta) == (STEPS * UPDATES, UPDATES, 0.0)
    assert dense_reward_of(config).kl_coefficient == 0.3
    with pytest.raises(ConfigError, match="4 prompts of a step cannot be divided among 3 processes"):
        grpo_arguments(config, 3)
    odd = config.model_copy(update={"trl": config.trl.model_copy(update={"batch_size": 5})})
    with pytest.raises(ConfigError, match=r"trl\.batch_size is 5, but a process has 12 responses"):
        grpo_arguments(odd, 1)
