"""Real, short SFT runs: the pair that they write, what they refuse, and how they resume."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import killed_job
import pytest
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, adapter_base_folder, load_manifest, verify_files
from dense_reward_trainer.cli import main
from dense_reward_trainer.data.sources import DataSource, data_sha256, load, split
from dense_reward_trainer.jobs import sft as sft_job
from served_pair import environment

pytestmark = pytest.mark.slow

STEPS = 22  # of a run that is hard to resume
PROBLEMS = [(a, b) for a in range(3, 18) for b in range(4, 60, 11)]


def sft(recipe: str, folder: Path, *overrides: str) -> int:
    return main(["sft", recipe, f"output_dir={folder}", "threads=1", *overrides])


def trained(recipe: str, folder: Path, *overrides: str) -> Path:
    assert sft(recipe, folder, *overrides) == 0
    return folder


def manifests(folder: Path) -> tuple[Manifest, Manifest]:
    return load_manifest(folder / "checkpoints" / "sft"), load_manifest(folder / "checkpoints" / "reference")


def served(folder: Path) -> bool:
    """Whether the pair loads, passes its probe, and comes from one run."""
    engine, _, _ = load_pair(
        folder / "checkpoints" / "sft",
        folder / "checkpoints" / "reference",
        ServingOptions(max_batch_tokens=1024),
        LoadContext(lambda _: None),
    )
    return engine.info.related


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of arithmetic_sft_tiny."""
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
    assert losses[-1] < losses[0] - 1.0, "the loss falls"
    assert [line["step"] for line in lines if "eval_loss" in line] == [10, 20]
    assert (tiny / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (tiny / "resume").exists(), "a finished run needs no optimiser states"


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
    assert re.search(
        r"\(data.seed: 0 -> 7, learning_rate: [0-9.e-]+ -> 0.1\), so .*: use another output_dir",
        capsys.readouterr().err,
    )


def test_what_leaves_the_result_alone_may_change(tiny: Path) -> None:
    assert sft("arithmetic_sft_tiny", tiny, "save_every_steps=3", "log_every_steps=1") == 0


def test_milestones_do_not_change_where_training_ends(tiny: Path, tmp_path: Path) -> None:
    other = trained("arithmetic_sft_tiny", tmp_path / "run", "milestones={base: 0, early: 0.1, late: 0.9}")
    finished = [load_manifest(folder / "checkpoints" / "sft") for folder in (tiny, other)]
    assert finished[0].weights_sha256 == finished[1].weights_sha256
    assert sorted(path.name for path in (other / "checkpoints").iterdir()) == ["base", "early", "late", "sft"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["scratch.max_position_embeddings=40"], "arithmetic:1: "),
        (
            ["max_length_tokens=65"],
            "max_length_tokens is 65, but the model takes at most 64: set max_length_tokens to 64, or to null",
        ),
        (["milestones.reference=0.99"], "milestone reference at 0.99 of the samples falls on the last step (20)"),
        (["data.held_out_fraction=0"], "nothing is held out"),
        (["scratch=null", "base_model=./no_such_folder"], "./no_such_folder: no such folder"),
        (["device=cuda"], "device cuda: torch can use no GPU"),
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


def test_a_run_that_is_too_short_for_its_schedule_says_so() -> None:
    steps = {"base": 0, "early": 1, "reference": 1}
    short = [*sft_job.schedule_warnings(30, steps, 2)]
    assert [line.partition(":")[2].partition(",")[0] for line in short] == [
        " warmup_steps is 30",
        " the milestones early and reference are the same model",
    ]
    assert not [*sft_job.schedule_warnings(1, {"base": 0, "early": 1, "reference": 2}, 3)]


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
    """Demonstrations of very different lengths; their number is not a multiple of a batch size."""
    path = folder / "varied.jsonl"
    rows = ({"prompt": f"{a} times {b}?", "response": f"{'so ' * (a % 9)}it is {a * b}"} for a, b in PROBLEMS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hard_to_resume(source: Path) -> list[str]:
    """Two epochs, accumulation, batches by length, a short last step, states saved within epochs."""
    return [
        f"data={{source: {source}, held_out_fraction: 0.1}}",
        "epochs=2",
        "batch_size=4",
        "gradient_accumulation=2",
        "group_by_length=true",
        "save_every_steps=4",
        "eval_every_steps=7",
        "log_every_steps=1",
        "scratch.max_position_embeddings=128",
    ]


def ended_at_step(number: int, signal_number: signal.Signals, folder: Path, overrides: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a run that got the signal when it logged that step."""
    arguments = ["sft", "arithmetic_sft_tiny", f"output_dir={folder}", "threads=1", *overrides]
    command = killed_job.command(signal_number, number, *arguments)
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert not (folder / "checkpoints" / "sft").exists(), "ended in the middle"
    return ended.returncode, ended.stderr


def logged_losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_same_outcome(resumed: Path, unbroken: Path) -> None:
    """The same checkpoints to the bit, and the same losses, each step once."""
    for expected, found in zip(manifests(unbroken), manifests(resumed), strict=True):
        assert found.files == expected.files
        assert found.probe == expected.probe
        assert found.run_id == json.loads((resumed / "run.json").read_text())["run_id"]
    assert [step for step, _ in logged_losses(resumed)] == list(range(1, STEPS + 1))
    assert logged_losses(resumed) == logged_losses(unbroken)


def test_a_killed_run_goes_on_to_bitwise_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*hard_to_resume(varied(tmp_path)), "milestones={base: 0, reference: 0.75}"]
    unbroken = trained("arithmetic_sft_tiny", tmp_path / "unbroken", *overrides)
    killed = tmp_path / "killed"
    code, stderr = ended_at_step(14, signal.SIGKILL, killed, overrides)
    assert code == -signal.SIGKILL, stderr
    run_id = json.loads((killed / "run.json").read_text())["run_id"]
    (killed / "resume" / "checkpoint-999").mkdir()

    capsys.readouterr()
    trained("arithmetic_sft_tiny", killed, *overrides)
    reported = capsys.readouterr().err
    assert "checkpoint-999: a kill or a full disk had left it incomplete" in reported
    assert "resumed at step 12" in reported
    assert_same_outcome(killed, unbroken)
    assert manifests(killed)[0].run_id == run_id
    starts = [load_manifest(folder / "checkpoints" / "base") for folder in (killed, unbroken)]
    assert starts[0].files == starts[1].files, "random weights are written at step 0"
    assert [start.optimiser_step for start in starts] == [0, 0]


def test_an_interrupted_run_stops_quietly_refuses_other_data_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = varied(tmp_path)
    overrides = [*hard_to_resume(source), "group_by_length=false"]
    unbroken = trained("arithmetic_sft_tiny", tmp_path / "unbroken", *overrides)
    interrupted = tmp_path / "interrupted"
    code, stderr = ended_at_step(14, signal.SIGINT, interrupted, overrides)
    assert code == 130, stderr
    assert "Traceback" not in stderr
    line = f"stopped by Ctrl-C: start the same command again to go on from what is complete in {interrupted}"
    assert stderr.splitlines().count(line) == 1

    demonstrations = source.read_text()
    source.write_text("".join(demonstrations.splitlines(keepends=True)[:-1]))
    assert sft("arithmetic_sft_tiny", interrupted, *overrides) == 2
    assert "started with different data" in capsys.readouterr().err
    source.write_text(demonstrations)

    reference = interrupted / "checkpoints" / "reference"
    reference.rename(tmp_path / "moved")
    assert sft("arithmetic_sft_tiny", interrupted, *overrides) == 2
    assert "reference is gone" in capsys.readouterr().err
    (tmp_path / "moved").rename(reference)

    trained("arithmetic_sft_tiny", interrupted, *overrides)
    assert_same_outcome(interrupted, unbroken)


def test_a_run_whose_template_changed_after_a_kill_is_refused_and_goes_on_with_the_first_one(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, killed = tmp_path / "base", tmp_path / "killed"
    shutil.copytree(tiny / "checkpoints" / "sft", base)
    (base / "manifest.json").unlink()
    overrides = [f"base_model={base}", "milestones.reference=0.5", "max_steps=8", "save_every_steps=1"]
    arguments = ["sft", "sft_full_tiny", f"output_dir={killed}", "threads=1", *overrides]
    ended = subprocess.run(
        killed_job.command(signal.SIGKILL, 6, *arguments),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    reference, metrics = killed / "checkpoints" / "reference" / "manifest.json", killed / "metrics.jsonl"
    written = reference.read_bytes(), metrics.read_bytes(), (killed / "run.json").read_bytes()

    template = base / "chat_template.jinja"
    first = template.read_text()
    template.write_text("!" + first)
    assert template.read_text() != first
    assert sft("sft_full_tiny", killed, *overrides) == 2
    error = capsys.readouterr().err
    assert "started with a different chat template: restore it" in error
    assert "Traceback" not in error
    assert written == (reference.read_bytes(), metrics.read_bytes(), (killed / "run.json").read_bytes())

    template.write_text(first)
    assert sft("sft_full_tiny", killed, *overrides) == 0
    assert "resumed at step 5" in capsys.readouterr().err
    assert served(killed)


def test_a_run_begins_with_what_it_read_and_what_it_did_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"id": i, "question": f"Add {i} and {i}.", "answer": f"{2 * i}"} for i in range(12)]
    rows[3]["source"] = "own"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data={{source: {path}, held_out_fraction: 0.1}}", "max_steps=2", "eval_every_steps=null"]
    assert sft("arithmetic_sft_tiny", tmp_path / "run", *given) == 0
    first, second, *_ = capsys.readouterr().err.split("\n")
    assert first == f"{path}: 12 rows read as question+answer"
    assert second == "columns not read: id, source (in 1 of 12 rows)"


# peft 0.21 asks transformers 5.23 for an attribute by its old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_trained_on_a_base_model_and_names_it(tiny: Path, tmp_path: Path) -> None:
    base = tiny / "checkpoints" / "sft"
    folder = trained("sft_lora_tiny", tmp_path / "lora", f"base_model={base}")
    for manifest in manifests(folder):
        assert adapter_base_folder(folder / "checkpoints" / manifest.role, manifest) == base.resolve()
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
