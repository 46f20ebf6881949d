"""The `evaluate` job on a tiny pair on disk: every kind of policy in one table, and samples that are shared."""

import errno
import json
import shutil
import signal
import subprocess
from pathlib import Path

import killed_job
import pytest
import yaml
from dense_reward_trainer.cli import main
from served_pair import environment
from shell_command import next_commands

pytestmark = pytest.mark.slow


def write_config(pair: Path, out: Path, **changes: object) -> str:
    sft, reference = str(pair / "sft"), str(pair / "reference")
    policies: dict[str, object] = {
        "plain": sft,
        "majority": {"checkpoint": sft, "choose": {"samples": 6, "by": "majority"}},
        "power": {"checkpoint": sft, "choose": {"samples": 3, "by": "power", "power": 4.0}},
        "cold": {"checkpoint": sft, "temperature": 0.5, "top_p": 0.9, "min_p": 0.01},
        "tilted": {"checkpoint": sft, "tilt": {"reference": reference, "strength": 0.5}},
        "extrapolated": {"checkpoint": sft, "extrapolate": {"base": reference, "strength": 0.1}},
    }
    values: dict[str, object] = {
        "output_dir": str(out),
        "policies": policies,
        "held_out": str(pair / "held_out.jsonl"),
        "held_out_options": {"max_new_tokens": 8, "samples_per_prompt": 2, "checker": "last_number"},
        "device": "cpu",
        "threads": 1,
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return str(path)


def test_every_kind_of_policy_has_its_row_and_its_samples(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation"
    assert main(["evaluate", write_config(pair_folder, out, pass_at=[1, 2])]) == 0
    names = ["plain", "majority", "power", "cold", "tilted", "extrapolated"]
    figures = json.loads((out / "evaluation.json").read_text())
    assert list(figures) == names
    table = capsys.readouterr().err
    assert measured_lines(table) == [
        f"measuring {name}" for name in ("plain, majority, power", "cold", "tilted", "extrapolated")
    ]
    assert [line.split()[0] for line in table.splitlines() if line.startswith(tuple(names))] == names
    assert all(figures[name]["nll_per_token"] > 0 for name in ("plain", "cold", "tilted", "extrapolated"))
    assert figures["cold"]["nll_per_token"] == figures["plain"]["nll_per_token"]
    assert figures["tilted"]["nll_per_token"] != figures["plain"]["nll_per_token"]
    assert figures["extrapolated"]["nll_per_token"] != figures["plain"]["nll_per_token"]
    assert figures["majority"]["greedy_accuracy"] is None
    prompts = figures["plain"]["length_tokens"]["count"]
    lines = {name: (out / f"samples-{name}.jsonl").read_text().splitlines() for name in names}
    assert [len(lines[name]) for name in names] == [3 * prompts, prompts, prompts, *[3 * prompts] * 3]
    plain = [json.loads(line)["text"] for line in lines["plain"]]
    assert [json.loads(line)["text"] for line in lines["tilted"]] != plain
    for name in names:
        assert 0 < figures[name]["distinct_1"] <= figures[name]["distinct_2"] <= 1
        assert figures[name]["refusals"]["value"] == 0.0
    right = [json.loads(line)["right"] for line in lines["plain"]][prompts:]
    either = [any(right[at : at + 2]) for at in range(0, len(right), 2)]
    assert figures["plain"]["pass_at"]["2"]["value"] == sum(either) / len(either)
    assert figures["majority"]["pass_at"].keys() == {"1"}
    assert "pass@2" in table


@pytest.mark.parametrize("last", ["missing", "{sft}|tilt|reference", "{sft}|extrapolate|base"])
def test_a_missing_checkpoint_is_refused_before_the_first_policy_is_measured(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], last: str
) -> None:
    checkpoint, *keys = last.format(sft=pair_folder / "sft").split("|")
    policy: dict[str, object] = {"checkpoint": checkpoint} | ({keys[0]: {keys[1]: "missing"}} if keys else {})
    policies = {"plain": str(pair_folder / "sft"), "last": policy}
    assert main(["evaluate", write_config(pair_folder, tmp_path / "out", policies=policies)]) == 2
    printed = capsys.readouterr().err
    assert "error: missing: no such checkpoint folder" in printed
    assert "measuring" not in printed


def test_a_checkpoint_that_is_its_own_reference_is_refused_in_one_line(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = str(pair_folder / "sft")
    policies = {"tilted": {"checkpoint": sft, "tilt": {"reference": sft}}}
    assert main(["evaluate", write_config(pair_folder, tmp_path / "out", policies=policies)]) == 2
    assert "cannot be tilted away from" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "evaluation.json").exists()


SAMPLES = ("samples-plain.jsonl", "samples-cold.jsonl")


def two_policies(pair: Path, **changes: object) -> dict[str, object]:
    return {"plain": str(pair / "sft"), "cold": {"checkpoint": str(pair / "sft"), "temperature": 0.5} | changes}


def measured_lines(printed: str) -> list[str]:
    """What was measured, and why again; the progress stands on other lines."""
    lines = printed.replace("\r", "\n").split("\n")
    return [line.split(" (")[0] for line in lines if line.startswith("measuring") or "measured again" in line]


@pytest.fixture(scope="module")
def evaluated(pair_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken evaluation of two policies."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    assert main(["evaluate", write_config(pair_folder, out, policies=two_policies(pair_folder))]) == 0
    return out


def again(pair: Path, evaluated: Path, tmp_path: Path, **changes: object) -> tuple[Path, str]:
    """A copy of the finished folder, and the configuration that names it."""
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    return out, write_config(pair, out, **({"policies": two_policies(pair)} | changes))


def test_an_evaluation_that_was_killed_keeps_what_it_measured_and_ends_alike(
    pair_folder: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = write_config(pair_folder, out, policies=two_policies(pair_folder))
    command = killed_job.command(signal.SIGKILL, "plain.json", "evaluate", config)
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "evaluation.json").exists()
    assert main(["evaluate", config]) == 0
    printed = capsys.readouterr().err
    assert measured_lines(printed) == ["measuring cold"]
    assert "measured by an earlier start: 1 policies" in printed
    for name in ("evaluation.json", *SAMPLES):
        assert (out / name).read_bytes() == (evaluated / name).read_bytes()
    assert next_commands(printed.splitlines()[-1]) == [f"dense-reward-train report {out} --output {out}/report.html"]


def test_a_full_disk_is_named_and_what_was_measured_before_is_kept(
    pair_folder: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    replace = Path.replace

    def without_space(partial: Path, target: Path) -> Path:
        if target.name == "cold.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(partial, target)

    out = tmp_path / "out"
    config = write_config(pair_folder, out, policies=two_policies(pair_folder))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", without_space)
        assert main(["evaluate", config]) == 2
    assert "because the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert main(["evaluate", config]) == 0
    assert measured_lines(capsys.readouterr().err) == ["measuring cold"]
    assert (out / "evaluation.json").read_bytes() == (evaluated / "evaluation.json").read_bytes()


def test_a_policy_that_changed_is_measured_again_with_the_reason_and_the_others_are_kept(
    pair_folder: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = again(pair_folder, evaluated, tmp_path, policies=two_policies(pair_folder, temperature=0.6))
    assert main(["evaluate", config]) == 0
    printed = capsys.readouterr().err
    assert measured_lines(printed) == ["cold is measured again: its options changed", "measuring cold"]
    same = {name: (out / name).read_bytes() == (evaluated / name).read_bytes() for name in SAMPLES}
    assert same == dict(zip(SAMPLES, (True, False), strict=True))


def test_other_weights_in_the_same_folder_are_measured_again(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "policy"
    shutil.copytree(pair_folder / "early", checkpoint)
    out = tmp_path / "out"
    config = write_config(pair_folder, out, policies={"one": str(checkpoint)})
    assert main(["evaluate", config]) == 0
    shutil.rmtree(checkpoint)
    shutil.copytree(pair_folder / "reference", checkpoint)
    assert main(["evaluate", config]) == 0
    again = [line for line in measured_lines(capsys.readouterr().err) if "again" in line]
    assert again == [f"one is measured again: the checkpoint {checkpoint} changed"]


def test_what_an_earlier_start_left_damaged_is_measured_again(
    pair_folder: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = again(pair_folder, evaluated, tmp_path)
    (out / "samples-cold.jsonl").unlink()
    (out / "measured" / "plain.json").write_text("{")
    assert main(["evaluate", config]) == 0
    assert measured_lines(capsys.readouterr().err) == [
        f"plain is measured again: {out / 'measured' / 'plain.json'} cannot be read",
        f"cold is measured again: {out / 'samples-cold.jsonl'} is missing, or was changed",
        "measuring plain",
        "measuring cold",
    ]
    assert (out / "evaluation.json").read_bytes() == (evaluated / "evaluation.json").read_bytes()


def test_other_prompts_or_another_seed_are_refused_and_nothing_is_measured(
    pair_folder: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((pair_folder / "held_out.jsonl").read_text().splitlines(keepends=True)[:-1]))
    out, config = again(pair_folder, evaluated, tmp_path)
    seeded = write_config(pair_folder, out, held_out_options={"max_new_tokens": 8, "seed": 1})
    assert main(["evaluate", seeded]) == 2
    assert "held_out_options.seed: 0 -> 1" in capsys.readouterr().err
    started = yaml.safe_load((out / "config.yaml").read_text()) | {"held_out": str(fewer)}
    (out / "config.yaml").write_text(yaml.safe_dump(started))
    config = write_config(pair_folder, out, held_out=str(fewer), policies=two_policies(pair_folder))
    assert main(["evaluate", config]) == 2
    printed = capsys.readouterr().err
    assert "was started with different inputs (held-out prompts)" in printed
    assert measured_lines(printed) == []


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("model.safetensors", "is missing, which the manifest of"),
        ("held_out.jsonl", "held_out.jsonl, but there is no such file: name held_out.jsonl of the SFT run"),
    ],
)
def test_a_missing_file_is_refused_before_the_first_policy_is_measured(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str, words: str
) -> None:
    pair = tmp_path / "pair"
    shutil.copytree(pair_folder, pair)
    config = write_config(
        pair, tmp_path / "out", policies={"first": str(pair / "reference"), "last": str(pair / "sft")}
    )
    place = pair if missing == "held_out.jsonl" else pair / "sft"
    (place / missing).unlink()
    assert main(["evaluate", config]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert measured_lines(printed) == []
    assert not (tmp_path / "out").exists(), "nothing was started"


def test_a_policy_whose_text_cannot_be_encoded_is_refused_before_the_first_policy_is_measured(
    pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pair_folder / "sft", tmp_path / "last")
    manifest = json.loads((tmp_path / "last" / "manifest.json").read_text())
    (tmp_path / "last" / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64}))
    policies = {"first": str(pair_folder / "sft"), "last": str(tmp_path / "last")}
    assert main(["evaluate", write_config(pair_folder, tmp_path / "out", policies=policies)]) == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'last'}: its tokenizer is not the one of its manifest: adopt the checkpoint again" in printed
    assert measured_lines(printed) == []
