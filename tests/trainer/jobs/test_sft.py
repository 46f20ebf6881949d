"""Real, short SFT runs: the pair that they leave, how they refuse, and how they go on after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, load_manifest, verify_files
from dense_reward_trainer.cli import main
from dense_reward_trainer.data.sources import DataSource, data_sha256, load, split

PROBLEMS = [(a, b) for a in range(3, 18) for b in range(4, 60, 11)]


def sft(recipe: str, folder: Path, *overrides: str) -> int:
    return main(["sft", recipe, f"output_dir={folder}", "threads=1", *overrides])


def trained(recipe: str, folder: Path, *overrides: str) -> Path:
    assert sft(recipe, folder, *overrides) == 0
    return folder


def manifests(folder: Path) -> tuple[Manifest, Manifest]:
    return load_manifest(folder / "checkpoints" / "sft"), load_manifest(folder / "checkpoints" / "reference")


def served(folder: Path) -> bool:
    """Whether the pair loads, proves itself, and is of one run."""
    engine, _, _ = load_pair(
        folder / "checkpoints" / "sft",
        folder / "checkpoints" / "reference",
        ServingOptions(max_batch_tokens=1024),
        LoadContext(lambda _: None),
    )
    return engine.info.related


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny twin of the demonstration's recipe, run to its end."""
    return trained("arithmetic_sft_tiny", tmp_path_factory.mktemp("tiny") / "run")


def test_a_run_leaves_a_pair_that_proves_itself(tiny: Path) -> None:
    sft_manifest, reference = manifests(tiny)
    for name, manifest in (("sft", sft_manifest), ("reference", reference)):
        verify_files(tiny / "checkpoints" / name, manifest)
        assert manifest.role == name
    assert sft_manifest.run_id == reference.run_id
    assert sft_manifest.weights_sha256 != reference.weights_sha256
    assert served(tiny)


def test_the_reference_is_the_first_step_at_or_past_half_of_the_samples(tiny: Path) -> None:
    sft_manifest, reference = manifests(tiny)
    samples = sft_manifest.unique_samples
    assert samples is not None
    assert sft_manifest.samples_processed == sft_manifest.samples_total == reference.samples_total == 2 * samples
    assert reference.samples_processed is not None
    assert samples <= reference.samples_processed < samples + 8
    assert (reference.optimiser_step, sft_manifest.optimiser_step) == (10, 20)
    assert reference.learning_rate is not None
    assert sft_manifest.learning_rate is not None
    assert 0.0 == sft_manifest.learning_rate < reference.learning_rate < 3e-3


def test_the_run_folder_tells_what_happened(tiny: Path) -> None:
    lines = [json.loads(line) for line in (tiny / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 1.0, "a model that learns"
    assert [line["step"] for line in lines if "eval_loss" in line] == [10, 20]
    assert (tiny / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (tiny / "resume").exists(), "optimiser states are of no use to a finished run"


def test_the_held_out_demonstrations_are_kept_for_later_jobs(tiny: Path) -> None:
    source = DataSource.model_validate({"source": "arithmetic", "arithmetic": {"demonstrations": 80, "digits": 2}})
    parts = split(load(source).demonstrations, 0.1, 0)
    kept = load(DataSource(source=str(tiny / "held_out.jsonl"))).demonstrations
    assert [(d.messages, d.answer) for d in kept] == [(d.messages, d.answer) for d in parts.held_out]
    assert manifests(tiny)[0].data_sha256 == data_sha256(parts.train)


def test_a_finished_run_says_so_and_does_nothing(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tiny / "checkpoints" / "sft" / "manifest.json").stat().st_mtime_ns
    assert sft("arithmetic_sft_tiny", tiny) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (tiny / "checkpoints" / "sft" / "manifest.json").stat().st_mtime_ns == before


def test_another_configuration_in_the_same_folder_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft("arithmetic_sft_tiny", tiny, "learning_rate=0.1", "data.seed=7") == 2
    assert "(data.seed, learning_rate): use another output_dir" in capsys.readouterr().err


def test_what_leaves_the_result_alone_may_change(tiny: Path) -> None:
    assert sft("arithmetic_sft_tiny", tiny, "save_every_steps=3", "log_every_steps=1") == 0


def test_milestones_do_not_change_where_training_ends(tiny: Path, tmp_path: Path) -> None:
    other = trained("arithmetic_sft_tiny", tmp_path / "run", "milestones={early: 0.1, late: 0.9}")
    finished = [load_manifest(folder / "checkpoints" / "sft") for folder in (tiny, other)]
    assert finished[0].weights_sha256 == finished[1].weights_sha256
    assert sorted(path.name for path in (other / "checkpoints").iterdir()) == ["early", "late", "sft"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["scratch.max_position_embeddings=40"], "arithmetic:1: "),
        (["max_length_tokens=65"], "max_length_tokens is 65, but the model takes at most 64"),
        (["milestones.reference=0.99"], "milestone reference at 0.99 of the samples falls on the last step (20)"),
        (["data.held_out_fraction=0"], "nothing is held out"),
        (["scratch=null", "base_model=./no_such_folder"], "./no_such_folder: no such folder"),
        (["device=cuda"], "torch sees no GPU"),
    ],
)
def test_a_run_that_cannot_be_done_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], reason: str
) -> None:
    if "device=cuda" in overrides and os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU")
    assert sft("arithmetic_sft_tiny", tmp_path / "run", *overrides) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists(), "a corrected configuration may use the same folder"


def test_too_long_demonstrations_are_left_out_and_counted_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["max_length_tokens=43", "data.skip_bad=true", "max_steps=4", "eval_every_steps=null"]
    folder = trained("arithmetic_sft_tiny", tmp_path / "run", *overrides)
    assert "demonstrations, the first is arithmetic:" in capsys.readouterr().err
    unique = manifests(folder)[0].unique_samples
    assert unique is not None
    assert unique < 74


def test_the_cure_that_is_printed_for_bad_lines_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some_bad.jsonl"
    path.write_text(varied(tmp_path).read_text() + '{"prompt": "no response"}\n')
    given = [f"data={{source: {path}, held_out_fraction: 0.1}}", "scratch.max_position_embeddings=128", "max_steps=4"]
    assert sft("arithmetic_sft_tiny", tmp_path / "run", *given) == 2
    cure = re.search(r"add (--\S+) to the command", capsys.readouterr().err)
    assert cure is not None
    assert sft("arithmetic_sft_tiny", tmp_path / "run", cure[1], *given) == 0
    assert "left out 1 bad lines" in capsys.readouterr().err


def test_so_is_the_one_for_demonstrations_that_are_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["max_length_tokens=43", "max_steps=4", "eval_every_steps=null"]
    assert sft("arithmetic_sft_tiny", tmp_path / "run", *given) == 2
    cure = re.search(r"add (--\S+) to the command", capsys.readouterr().err)
    assert cure is not None
    assert sft("arithmetic_sft_tiny", tmp_path / "run", *given, cure[1]) == 0


def varied(folder: Path) -> Path:
    """Demonstrations of very different lengths, whose number no batch size divides."""
    path = folder / "varied.jsonl"
    rows = ({"prompt": f"{a} times {b}?", "response": f"{'so ' * (a % 9)}it is {a * b}"} for a, b in PROBLEMS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hard_to_resume(source: Path) -> list[str]:
    """Three epochs, accumulation, batches by length, a last step that is short, states saved at odd places."""
    return [
        f"data={{source: {source}, held_out_fraction: 0.1}}",
        "epochs=3",
        "batch_size=4",
        "gradient_accumulation=2",
        "group_by_length=true",
        "save_every_steps=4",
        "eval_every_steps=7",
        "log_every_steps=1",
        "scratch.max_position_embeddings=128",
    ]


def command(folder: Path, *overrides: str) -> list[str]:
    arguments = ["sft", "arithmetic_sft_tiny", f"output_dir={folder}", "threads=1", *overrides]
    return [sys.executable, "-m", "dense_reward_trainer.cli", *arguments]


def started(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command(folder, *overrides), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def logged_losses(folder: Path) -> list[tuple[int, float]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    logged = [json.loads(line) for line in lines if '"loss"' in line and line.endswith("}")]
    return [(line["step"], line["loss"]) for line in logged]


@pytest.mark.parametrize("group_by_length", ["true", "false"])
def test_a_killed_run_goes_on_to_bitwise_the_same_weights(
    group_by_length: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*hard_to_resume(varied(tmp_path)), f"group_by_length={group_by_length}"]
    unbroken = trained("arithmetic_sft_tiny", tmp_path / "unbroken", *overrides)
    killed = tmp_path / "killed"
    process = started(killed, *overrides)
    wait_until(lambda: len(logged_losses(killed)) >= 14, process)
    process.kill()
    process.communicate()
    assert not (killed / "checkpoints" / "sft").exists(), "killed in the middle"
    run_id = json.loads((killed / "run.json").read_text())["run_id"]
    (killed / "resume" / "checkpoint-999").mkdir()

    capsys.readouterr()
    trained("arithmetic_sft_tiny", killed, *overrides)
    told = capsys.readouterr().err
    assert "checkpoint-999: a kill had left it incomplete" in told
    assert "resumed at step" in told
    for expected, found in zip(manifests(unbroken), manifests(killed), strict=True):
        assert found.files == expected.files
        assert found.probe == expected.probe
        assert found.run_id == run_id
    assert [step for step, _ in logged_losses(killed)] == list(range(1, 34))
    assert logged_losses(killed) == logged_losses(unbroken)


def test_an_interrupted_run_stops_quietly_and_refuses_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = varied(tmp_path)
    overrides = [*hard_to_resume(source), "epochs=300"]
    folder = tmp_path / "run"
    process = started(folder, *overrides)
    wait_until(lambda: len(logged_losses(folder)) >= 1, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told

    source.write_text("".join(source.read_text().splitlines(keepends=True)[:-1]))
    assert sft("arithmetic_sft_tiny", folder, *overrides) == 2
    assert "started with another data" in capsys.readouterr().err


def test_a_milestone_that_is_gone_is_not_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    overrides = [*hard_to_resume(varied(tmp_path)), "epochs=300"]
    process = started(folder, *overrides, "milestones={reference: 0.001}")
    wait_until((folder / "resume" / "checkpoint-4" / "trainer_state.json").exists, process)
    process.kill()
    process.communicate()
    (folder / "checkpoints" / "reference").rename(tmp_path / "moved")
    assert sft("arithmetic_sft_tiny", folder, *overrides, "milestones={reference: 0.001}") == 2
    assert "reference is gone" in capsys.readouterr().err


# peft 0.21 asks transformers 5.23 for an attribute by its old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_trained_on_a_base_model_and_names_it(tiny: Path, tmp_path: Path) -> None:
    base = tiny / "checkpoints" / "sft"
    folder = trained("sft_lora_tiny", tmp_path / "lora", f"base_model={base}")
    for manifest in manifests(folder):
        assert manifest.adapter_base == str(base.resolve())
        assert "model.safetensors" in manifest.adapter_base_files
        assert "adapter_model.safetensors" in manifest.files
        assert "model.safetensors" not in manifest.files
        assert manifest.base_model == str(base)
        assert manifest.dtype == "bfloat16"
    assert served(folder)
    copy = load_manifest(folder / "checkpoints" / "sft").model_copy(update={"adapter_base_files": {"gone.json": "0"}})
    with pytest.raises(CheckpointError, match=r"gone\.json is missing"):
        verify_files(folder / "checkpoints" / "sft", copy)


def test_every_weight_of_a_base_model_is_trained_through_its_chat_template(tiny: Path, tmp_path: Path) -> None:
    folder = trained("sft_full_tiny", tmp_path / "full", f"base_model={tiny / 'checkpoints' / 'sft'}")
    sft_manifest, reference = manifests(folder)
    assert (sft_manifest.renderer, sft_manifest.dtype, sft_manifest.adapter_base) == ("chat", "float32", None)
    assert sft_manifest.tokenizer_sha256 == manifests(tiny)[0].tokenizer_sha256
    assert (reference.samples_processed, sft_manifest.samples_processed) == (16, 32)
    assert served(folder)


def test_an_adapter_cannot_be_a_base_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert sft("sft_full_tiny", tmp_path / "run", f"base_model={tmp_path / 'adapter'}") == 2
    assert "is an adapter: merge it" in capsys.readouterr().err


def test_real_word_problems_are_learnt_from_a_file(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "data" / "word_problems.jsonl"
    folder = trained("gsm8k_sft_tiny", tmp_path / "run", f"data.source={source}")
    assert served(folder)
