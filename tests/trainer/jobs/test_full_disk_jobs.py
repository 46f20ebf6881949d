"""Jobs on a disk that is full at first and then grows: one sentence each time, and at the end the usual result.

A limit on the size of files stands for the disk: a write beyond it fails in the same way.
"""

import json
from pathlib import Path

import pytest
import yaml
from dense_reward.manifest import load_manifest
from dense_reward_trainer.cli import main
from limited_files import no_file_beyond
from served_pair import DATA, ServedPair

pytestmark = pytest.mark.slow

PREVIEW = ("preview.json", "preview.png", "preview.svg", "samples-SFT.jsonl", "samples-tilted-half.jsonl")
LIMITS = (0, 300, 20_000)
"""Bytes: nothing can be written; then the record of the run; then small results, but no weights."""


def arguments(job: str, served: ServedPair, out: Path) -> list[str]:
    pair = served.folder
    held_out, sft, reference = (str(pair / name) for name in ("held_out.jsonl", "sft", "reference"))
    short = {"max_new_tokens": 8, "samples_per_prompt": 1}
    values: dict[str, dict[str, object]] = {
        "sample": {"policy": sft, "prompts": held_out, "max_new_tokens": 8, "batch_size": 2},
        "evaluate": {"policies": {"plain": sft}, "held_out": held_out, "held_out_options": short},
        "credit": {"data": {"source": held_out}, "service_url": served.url, "answers": 3},
        "preview": {"sft": sft, "references": {"half": reference}, "labelled": held_out, "prompts": 3, **short},
        "gradient": {
            "policy": sft,
            "service_url": served.url,
            "prompts": DATA,
            "held_out": held_out,
            "held_out_options": short,
            "steps": 1,
            "batches": 3,
            "prompts_per_step": 2,
            "group_size": 2,
            "max_new_tokens": 8,
        },
        "rft": {
            "policy": sft,
            "data": DATA,
            "max_new_tokens": 8,
            "head": {"batch_size": 4, "warmup_steps": 0, "log_every_steps": 1},
            "policy_steps": {"steps": 1, "prompts_per_step": 2, "group_size": 2},
        },
        "irft": {"policy": sft, "data": DATA, "rounds": 1, "generation": {"max_new_tokens": 8}},
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"output_dir": str(out), "device": "cpu", "threads": 1, **values[job]}))
    return [job, str(path)]


def with_limit(size: int, command: list[str]) -> int:
    """Runs the job while no file can grow beyond so many bytes."""
    with no_file_beyond(size):
        return main(command)


def result_of(job: str, out: Path) -> object:
    """What the job was run for; of weights, their hash."""
    if job == "sample":
        return (out / "samples.jsonl").read_text()
    if job == "evaluate":
        return json.loads((out / "evaluation.json").read_text())
    if job == "gradient":
        return json.loads((out / "gradient.json").read_text())
    if job == "preview":
        return [(out / name).read_bytes() for name in PREVIEW]
    if job == "credit":
        return json.loads((out / "credit.json").read_text())["result"]
    manifests = sorted((out / "checkpoints").glob("*/manifest.json"))
    return {path.parent.name: load_manifest(path.parent).weights_sha256 for path in manifests}


@pytest.mark.parametrize("job", ["sample", "evaluate", "credit", "preview", "gradient", "rft", "irft"])
def test_a_full_disk_is_named_and_the_job_ends_alike_once_there_is_space(
    job: str, served: ServedPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(job, served, tmp_path / "run")
    refused = 0
    for size in LIMITS:
        if with_limit(size, command) == 0:
            break
        refused += 1
        printed = capsys.readouterr().err
        assert "a file could not be written completely, because the disk is full" in printed
        assert "Traceback" not in printed
    assert refused >= 2
    assert main(command) == 0
    assert main(arguments(job, served, tmp_path / "unbroken")) == 0
    result = result_of(job, tmp_path / "unbroken")
    assert result_of(job, tmp_path / "run") == result
    with_limit(0, command)
    assert result_of(job, tmp_path / "run") == result, "a finished result stays"
