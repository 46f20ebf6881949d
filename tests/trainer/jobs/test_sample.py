"""The `sample` job: responses of a tilted policy in a file that later jobs read."""

import json
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import killed_job
import pytest
from dense_reward_trainer.cli import main
from dense_reward_trainer.data.sources import DataSource, load
from served_pair import environment
from shell_command import next_commands

pytestmark = pytest.mark.slow


def arguments(pair: Path, out: Path, *more: str) -> list[str]:
    config = out.with_suffix(".yaml")
    config.write_text("max_new_tokens: 8\ndevice: cpu\nthreads: 1\n")
    policy = f"policy={{checkpoint: {pair / 'sft'}, tilt: {{reference: {pair / 'reference'}}}}}"
    return ["sample", str(config), policy, f"prompts={pair / 'held_out.jsonl'}", f"output_dir={out}", *more]


def test_samples_are_written_as_demonstrations_with_the_prompts_answers(pair_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(pair_folder, out, "samples_per_prompt=2", "limit=3")) == 0
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in (pair_folder / "held_out.jsonl").read_text().splitlines()][:3]
    assert [line["messages"][:-1] for line in lines] == [row["messages"][:-1] for row in given for _ in range(2)]
    assert [line["final_answer"] for line in lines] == [row["final_answer"] for row in given for _ in range(2)]
    assert lines[0]["messages"][-1] != lines[1]["messages"][-1]
    assert all(line["messages"][-1]["role"] == "assistant" for line in lines)
    assert {line["finished"] for line in lines} <= {True, False}
    kept = out / "kept.jsonl"
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines if line["messages"][-1]["content"].strip()))
    assert load(DataSource(source=str(kept), held_out_fraction=0.0)).demonstrations


def test_greedy_responses_are_the_same_again_and_those_of_the_tilted_policy(pair_folder: Path, tmp_path: Path) -> None:
    texts = []
    for name, more in {"a": ["seed=1"], "b": ["seed=2"], "plain": [f"policy={pair_folder / 'sft'}"]}.items():
        assert main(arguments(pair_folder, tmp_path / name, "greedy=true", *more)) == 0
        texts.append((tmp_path / name / "samples.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_cut_off_responses_and_a_reference_of_a_later_step_are_reported(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = f"policy={{checkpoint: {pair_folder / 'early'}, tilt: {{reference: {pair_folder / 'reference'}}}}}"
    notes = []
    for name, more in {"in-order": [], "later": [later, "max_new_tokens=1"]}.items():
        assert main(arguments(pair_folder, tmp_path / name, *more)) == 0
        finished = [
            json.loads(line)["finished"] for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()
        ]
        printed = capsys.readouterr().err
        assert ("learns to stop there" in printed) == (not all(finished))
        notes.append(("or from a later step" in printed, all(finished)))
    assert notes[0][0] is False
    assert notes[1] == (True, False)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("policy={checkpoint: x, choose: {by: majority}}", "remove policy.choose"),
        ("max_new_tokens=90", "set max_new_tokens to at most"),
        ("prompts=missing.jsonl", "no such file"),
        ("limit=0", "limit: "),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, complaint: str
) -> None:
    assert main(arguments(pair_folder, tmp_path / "out", override)) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert main(arguments(pair_folder, tmp_path / "out", "greedy=true", "samples_per_prompt=2")) == 2


BATCHES = ("samples_per_prompt=2", "batch_size=2", "max_new_tokens=8")


def test_samples_that_were_killed_go_on_to_those_of_an_unbroken_job_and_a_finished_one_is_kept(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(pair_folder, tmp_path / "unbroken", *BATCHES)) == 0
    killed = arguments(pair_folder, tmp_path / "killed", *BATCHES)
    command = killed_job.command(signal.SIGKILL, "000000001.jsonl", *killed)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    parts = sorted(part.name for part in (tmp_path / "killed" / "parts").iterdir())
    assert parts == ["000000000.jsonl", "000000001.jsonl"], "two of three batches are kept"
    assert main(killed) == 0
    samples = (tmp_path / "killed" / "samples.jsonl").read_bytes()
    assert samples == (tmp_path / "unbroken" / "samples.jsonl").read_bytes()
    assert len(samples.splitlines()) == 6
    assert not (tmp_path / "killed" / "parts").exists()
    printed = capsys.readouterr().err
    (following,) = next_commands(printed.splitlines()[-1])
    assert f"data.source={tmp_path / 'killed' / 'samples.jsonl'}" in shlex.split(following)
    assert main(killed) == 0
    assert "holds a finished run, so there is nothing to do" in capsys.readouterr().err
    assert (tmp_path / "killed" / "samples.jsonl").read_bytes() == samples
    assert main([*killed, "seed=1"]) == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err


def test_another_policy_in_the_same_folder_is_refused(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = tmp_path / "policy", tmp_path / "out"
    shutil.copytree(pair_folder / "early", checkpoint)
    command = arguments(pair_folder, out, f"policy={checkpoint}", *BATCHES)
    assert main(command) == 0
    shutil.rmtree(checkpoint)
    shutil.copytree(pair_folder / "reference", checkpoint)
    assert main(command) == 2
    assert "was started with different inputs (policy)" in capsys.readouterr().err
