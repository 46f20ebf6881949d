"""The preview job on models whose answers have known probabilities: figures and verdicts follow by algebra."""

import json
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import killed_job
import pytest
import yaml
from dense_reward_trainer.cli import main
from dense_reward_trainer.credit.auroc import Interval
from known_policies import write_known_policy
from served_pair import environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose SFT model is right with 0.4; its references `worse`, `better` and `flat` with 0.1, 0.6 and 0.5."""
    folder = tmp_path_factory.mktemp("run")
    write_known_policy(folder / "checkpoints" / "sft", 0.4)
    for step, (name, one) in enumerate({"worse": 0.1, "better": 0.6}.items()):
        write_known_policy(folder / "checkpoints" / name, one, role="reference", step=step)
    return folder


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(path: Path, count: int = 40) -> Path:
    return write_lines(path / "questions.jsonl", [{"prompt": f"{n}?", "final_answer": 1} for n in range(count)])


def judged(path: Path, answers: Sequence[str] = ("1", "2", "2", "1"), count: int = 15) -> Path:
    rows = [
        {"prompt": f"{n}?", "responses": list(answers), "right": [answer == "1" for answer in answers]}
        for n in range(count)
    ]
    return write_lines(path / "judged.jsonl", rows)


def preview(path: Path, labelled: Path, **values: object) -> str:
    """The text of preview.json of a run of the job that succeeds."""
    path.mkdir(exist_ok=True)
    out, config = path / "preview", path / "preview.yaml"
    fixed: dict[str, object] = {"max_new_tokens": 4, "checker": "last_number", "device": "cpu", "threads": 1}
    given = {"output_dir": str(out), "labelled": str(labelled), **fixed, **values}
    config.write_text(yaml.safe_dump(given))
    assert main(["preview", str(config)]) == 0
    return (out / "preview.json").read_text()


def test_the_worse_base_is_the_reference_to_train_on_and_every_share_is_the_one_of_the_algebra(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(preview(tmp_path, questions(tmp_path), run=str(run_folder), samples_per_prompt=8))
    assert (found["verdict"], found["reference"]) == ("gain", "worse")
    references = found["references"]
    assert references["better"]["verdict"] == "no"
    gains = found["gains"]
    free = {name: share["value"] for name, share in gains["free"].items()}
    tilted = {name: gain["share"]["value"] for name, gain in gains["tilted"].items()}
    assert free == pytest.approx({"SFT": 0.4, "greedy": 0.0, "temperature 0.5": 0.308, "top-p 0.95": 0.4}, abs=0.08)
    assert tilted == pytest.approx({"worse": 0.8, "better": 0.229}, abs=0.08)
    assert gains["tilted"]["worse"]["greedy"]["value"] == 1.0
    ranked = {(one["reference"], one["signal"], one["aggregate"]): one["auroc"]["value"] for one in found["ranking"]}
    assert ranked["worse", "reward", "sum"] == 1.0
    assert ranked["better", "reward", "min"] == 0.0
    assert ranked[None, "sft_logprob", "sum"] == 0.0
    printed = capsys.readouterr().err
    assert "worse reference, reward by sum: 1.00 [0.93, 1.00]; tilted 0." in printed
    assert printed.rstrip().splitlines()[-2].endswith("(best control, top-p 0.95): expect a gain")
    for name in ("preview.png", "preview.svg", "samples-SFT.jsonl", "samples-tilted-worse.jsonl"):
        assert (tmp_path / "preview" / name).stat().st_size > 1000


def test_a_preview_that_was_killed_keeps_its_answers_and_ends_alike(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled, values = questions(tmp_path), {"run": str(run_folder), "samples_per_prompt": 2}
    unbroken = preview(tmp_path / "unbroken", labelled, **values)
    (tmp_path / "unbroken" / "preview").rename(tmp_path / "whole")
    config = str(tmp_path / "unbroken" / "preview.yaml")
    command = killed_job.command(signal.SIGKILL, "answers-of-tilted,-worse.json", "preview", config)
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "unbroken" / "preview" / "preview.json").exists()
    capsys.readouterr()
    assert preview(tmp_path / "unbroken", labelled, **values) == unbroken
    printed = capsys.readouterr().err
    assert "answers of tilted, better" in printed
    assert "answers of SFT" not in printed


def test_a_reward_that_only_sharpens_is_no_more_than_a_control_gives(tmp_path: Path) -> None:
    write_known_policy(tmp_path / "sft", 0.7)
    write_known_policy(tmp_path / "flat", 0.5, role="reference", step=1)
    models = {"sft": str(tmp_path / "sft"), "references": {"flat": str(tmp_path / "flat")}}
    found = json.loads(preview(tmp_path, questions(tmp_path), **models))
    assert found["verdict"] == "control"
    assert found["reason"].endswith("no more than a control gives: greedy is free, and as good")


def test_judged_answers_are_used_as_they_are(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(preview(tmp_path, judged(tmp_path), run=str(run_folder)))
    printed = capsys.readouterr().err
    assert f"right and wrong are those that {tmp_path / 'judged.jsonl'} marks" in printed
    assert "checker" not in printed
    assert found["counts"] == {
        "prompts": 15,
        "right": 30,
        "wrong": 30,
        "prompts_with_right": 15,
        "prompts_with_wrong": 15,
    }
    assert (found["verdict"], found["reference"]) == ("gain", "worse")
    worse = found["gains"]["tilted"]["worse"]
    # weights pi_sft / pi_base: 4 for `1`, 2/3 for `2`
    assert worse["share"]["value"] == pytest.approx(8 / (8 + 4 / 3), abs=1e-4)
    assert worse["effective_samples"] == pytest.approx((8 + 4 / 3) ** 2 / (2 * 16 + 2 * 4 / 9), abs=1e-3)
    free = {name: Interval(**share).value for name, share in found["gains"]["free"].items()}
    assert free == pytest.approx({"SFT": 0.5, "likeliest answer": 0.0, "power 2": 0.4}, abs=1e-4)
    assert not list((tmp_path / "preview").glob("samples-*"))


def test_answers_that_are_all_wrong_give_no_verdict_but_the_cure(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(preview(tmp_path, judged(tmp_path, answers=("2", "2")), run=str(run_folder)))
    assert found["verdict"] == "unknown"
    assert found["ranking"] == []
    assert "0 right and 30 wrong answers to 15 prompts are too few" in found["reason"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"next: add judged answers to {tmp_path / 'judged.jsonl'}" in last, "nothing is sampled, so keys do not help"


def test_right_answers_to_few_prompts_give_no_verdict_however_many_they_are(run_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "responses": ["1"] * 5, "right": [n < 2] * 5} for n in range(20)]
    labelled = write_lines(tmp_path / "judged.jsonl", rows)
    found = json.loads(preview(tmp_path, labelled, run=str(run_folder)))
    counts = {"prompts": 20, "right": 10, "wrong": 90, "prompts_with_right": 2, "prompts_with_wrong": 18}
    assert (found["verdict"], found["counts"]) == ("unknown", counts)


def test_without_a_reference_there_is_a_table_and_no_reward(run_folder: Path, tmp_path: Path) -> None:
    sft = str(run_folder / "checkpoints" / "sft")
    found = json.loads(preview(tmp_path, judged(tmp_path), sft=sft))
    assert found["verdict"] == "unknown"
    assert found["reason"].startswith("no reference was given")
    assert {one["reference"] for one in found["ranking"]} == {None}


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["sft={run}/checkpoints/sft"], "name the models in one way"),
        (["run=null"], "name the models in one way"),
        (["references={{a: {run}/checkpoints/worse}}"], "run has its own references"),
        (["run=missing"], "run missing: no such folder"),
        (
            ["run=null", "sft={run}/checkpoints/sft", "references={{a: {run}/checkpoints/sft}}"],
            "reference a .* the same",
        ),
        (["labelled=missing.jsonl"], "missing.jsonl: there is no such file"),
        (["max_new_tokens=64"], "set max_new_tokens to at most 6"),
        (["checker=final_answers"], "checker"),
        (["strength=0"], "strength"),
        (["strength=200"], "strength: .* less than or equal to 100"),
    ],
)
def test_what_cannot_be_previewed_is_refused_in_one_line(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], complaint: str
) -> None:
    config = tmp_path / "preview.yaml"
    given = {"output_dir": str(tmp_path / "out"), "labelled": str(questions(tmp_path)), "run": str(run_folder)}
    config.write_text(yaml.safe_dump({**given, "device": "cpu"}))
    chosen = [override.format(run=run_folder) for override in overrides]
    assert main(["preview", str(config), *chosen]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(complaint, last), last
    assert not (tmp_path / "out").exists()


def test_answers_that_are_cut_off_or_hold_no_answer_are_counted_for_the_user(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = questions(tmp_path, count=4)
    sft = str(run_folder / "checkpoints" / "sft")
    preview(tmp_path, few, sft=sft, checker="final_answer")
    assert "the checker final_answer found no answer in 16 of 16 answers" in capsys.readouterr().err
    preview(tmp_path / "short", few, sft=sft, max_new_tokens=1)
    assert "16 of 16 answers were cut off at max_new_tokens 1, and count as wrong" in capsys.readouterr().err


def test_every_policy_has_its_own_file_of_answers_whatever_the_references_are_called(
    run_folder: Path, tmp_path: Path
) -> None:
    checkpoints = run_folder / "checkpoints"
    references = {"a": str(checkpoints / "worse"), "a-greedy": str(checkpoints / "better")}
    preview(tmp_path, questions(tmp_path, count=3), sft=str(checkpoints / "sft"), references=references)
    lines = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "preview").glob("*tilted*.jsonl")}
    sizes = {"tilted": 12, "greedy-tilted": 3}
    assert lines == {f"samples-{how}-{name}.jsonl": size for name in references for how, size in sizes.items()}


def test_an_answer_that_a_reference_cannot_read_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_known_policy(tmp_path / "short", 0.1, role="reference", step=0, positions=60)
    config = tmp_path / "preview.yaml"
    sft = str(run_folder / "checkpoints" / "sft")
    models = {"sft": sft, "references": {"short": str(tmp_path / "short")}, "device": "cpu"}
    labelled = write_lines(tmp_path / "long.jsonl", [{"prompt": "?" * 59, "response": "1", "right": True}] * 2)
    config.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "labelled": str(labelled), **models}))
    assert main(["preview", str(config)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search("reference short reads at most 60 tokens, but a prompt and its answer have 6[1-4]: ", last), last
