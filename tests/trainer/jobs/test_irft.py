"""Real, short runs of self-play: the pairs that they write, what they refuse, and how they resume."""

import json
import math
import shutil
import signal
import subprocess
from pathlib import Path

import killed_job
import pytest
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.manifest import Manifest, load_manifest, verify_files
from dense_reward.serving.pair_sources import pairs_of_run
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.sft import ScratchOptions
from served_pair import DATA, environment, write_pair
from shell_command import next_commands

pytestmark = pytest.mark.slow

STEPS = 6  # of a run of two rounds


def arguments(folder: Path, policy: Path, *overrides: str) -> list[str]:
    """Two rounds on 21 short additions, from a policy of random weights."""
    shortened = ["rounds=2", "beta=[0.1, 0.5]", "learning_rate=1e-3", "generation={max_new_tokens: 12, batch_size: 4}"]
    given = [f"output_dir={folder}", f"policy={policy}", f"data={json.dumps(DATA)}", *shortened, "threads=1"]
    return ["irft", "arithmetic_irft_tiny", *given, *overrides]


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> list[tuple[object, object]]:
    return [(line["step"], line["loss"]) for line in lines_of(folder / "metrics.jsonl") if "loss" in line]


def manifests(folder: Path) -> dict[str, Manifest]:
    return {path.name: load_manifest(path) for path in sorted((folder / "checkpoints").iterdir())}


def assert_served(folder: Path) -> None:
    """Every pair of the run loads, passes its probe, and comes from one run."""
    for pair in pairs_of_run(folder):
        engine, _, _ = load_pair(
            pair.sft, pair.reference, ServingOptions(max_batch_tokens=1024), LoadContext(lambda _: None)
        )
        assert engine.info.related


@pytest.fixture(scope="module")
def policy(pair_folder: Path) -> Path:
    return pair_folder / "sft"


@pytest.fixture(scope="module")
def played(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds."""
    folder = tmp_path_factory.mktemp("irft") / "run"
    assert main(arguments(folder, policy)) == 0
    return folder


def test_each_round_leaves_a_reference_and_the_last_one_the_model(played: Path, policy: Path) -> None:
    found = manifests(played)
    assert list(found) == ["round_0", "round_1", "sft"]
    assert [manifest.role for manifest in found.values()] == ["reference", "reference", "sft"]
    assert [manifest.optimiser_step for manifest in found.values()] == [0, 3, STEPS]
    assert [manifest.sample_fraction for manifest in found.values()] == [0.0, 11 / 21, 1.0]
    assert {manifest.run_id for manifest in found.values()} == {json.loads((played / "run.json").read_text())["run_id"]}
    assert found["round_0"].weights_sha256 == load_manifest(policy).weights_sha256
    assert [manifest.base_model for manifest in found.values()] == [
        str(policy),
        str(policy),
        str(played / "checkpoints" / "round_1"),
    ]
    assert len({manifest.weights_sha256 for manifest in found.values()}) == len(found)
    for name, manifest in found.items():
        verify_files(played / "checkpoints" / name, manifest)


def test_every_round_is_a_served_pair(played: Path) -> None:
    assert [pair.name for pair in pairs_of_run(played)] == ["round_0", "round_1"]
    assert_served(played)


def test_the_first_loss_of_each_round_is_log_2(played: Path) -> None:
    logged = losses(played)
    assert [step for step, _ in logged] == list(range(1, STEPS + 1))
    assert [logged[i][1] for i in (0, 3)] == pytest.approx([math.log(2)] * 2, abs=1e-4)
    # the warm-up begins at 0, so that the first step of a round trains nothing
    assert all(logged[i][1] != pytest.approx(math.log(2), abs=1e-4) for i in (2, 5)), (
        "the warm-up begins at 0, so that the first step trains nothing"
    )


def test_pairs_stay_on_disk_and_each_prompt_is_answered_once(played: Path, policy: Path) -> None:
    end = load_manifest(policy).end_of_turn_id
    rounds = [lines_of(played / "pairs" / f"round_{number}.jsonl") for number in (1, 2)]
    assert [len(pairs) for pairs in rounds] == [11, 10]
    pairs = [pair for each in rounds for pair in each]
    assert len({pair["place"] for pair in pairs}) == 21
    assert {len(str(pair["source"]).split(":")) for pair in pairs} == {2}
    finished = [bool(pair["finished"]) for pair in pairs]
    assert {True, False} == set(finished), "both kinds are tested"
    for pair in pairs:
        generated, demonstrated = pair["generated_ids"], pair["demonstration_ids"]
        assert isinstance(generated, list)
        assert isinstance(demonstrated, list)
        assert demonstrated[-1] == end
        assert (end in generated) == pair["finished"]
        assert generated.index(end) == len(generated) - 1 if pair["finished"] else len(generated) == 12


def test_what_was_generated_is_logged(played: Path) -> None:
    counted = [line for line in lines_of(played / "metrics.jsonl") if "pairs" in line]
    assert [(line["step"], line["round"], line["pairs"]) for line in counted] == [(0, 1, 11), (3, 2, 10)]
    assert (played / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (played / "resume").exists(), "a finished run needs no optimiser states"


def test_a_finished_run_says_so_and_does_nothing(
    played: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (played / "checkpoints" / "sft" / "manifest.json").stat().st_mtime_ns
    assert main(arguments(played, policy, "log_every_steps=3")) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (played / "checkpoints" / "sft" / "manifest.json").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def killed(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed at the last step of its second round: copy it."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    command = killed_job.command(signal.SIGKILL, STEPS, *arguments(folder, policy))
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return folder


def assert_same_outcome(resumed: Path, unbroken: Path) -> None:
    """The same weights to the bit, the same pairs, and the same losses, each step once."""
    for one, other in zip(manifests(resumed).values(), manifests(unbroken).values(), strict=True):
        assert one.weights_sha256 == other.weights_sha256
        assert one.probe == other.probe
    for path in sorted((unbroken / "pairs").iterdir()):
        assert (resumed / "pairs" / path.name).read_bytes() == path.read_bytes()
    assert losses(resumed) == losses(unbroken)


def test_a_run_killed_in_a_round_goes_on_in_it(
    played: Path, killed: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    kept = folder / "pairs" / "round_2.jsonl"
    generated = kept.stat().st_mtime_ns
    assert main(arguments(folder, policy)) == 0
    printed = capsys.readouterr().err
    assert "round 2: 3 steps on 10 pairs, resumed at step 2" in printed
    last = printed.splitlines()[-1]
    evaluate, serve = next_commands(last)
    assert f"'policies={{start: {policy}, irft: {folder}/checkpoints/sft}}'" in evaluate
    assert serve == f"dense-reward serve --run {folder}"
    assert kept.stat().st_mtime_ns == generated, "nothing is generated again"
    assert_same_outcome(folder, played)


def test_a_run_killed_while_it_generates_goes_on_where_it_was(
    played: Path, killed: Path, policy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    shutil.rmtree(folder / "resume" / "round_2")
    kept = folder / "pairs" / "round_2.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    assert main(arguments(folder, policy)) == 0
    assert_same_outcome(folder, played)


@pytest.mark.parametrize("change", ["seed=1", "batch_size=3", "epochs=2", "learning_rate=1", "data.seed=2"])
def test_other_settings_on_resume_are_refused_by_name(
    change: str, killed: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(killed, policy, change)) == 2
    assert f"different configuration ({change.partition('=')[0]}: " in capsys.readouterr().err


def test_other_weights_in_the_policys_folder_are_refused(
    killed: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    record = json.loads((folder / "run.json").read_text())
    record["identity"]["policy"] = "other weights"
    (folder / "run.json").write_text(json.dumps(record))
    assert main(arguments(folder, policy)) == 2
    assert "started with different inputs (policy)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["prompts=all", "previous_rounds=1", "beta=[0.1, 5.0]", "epochs=2", "gradient_accumulation=2"],
        ["loss=bernoulli", "bernoulli_b=2.0", "beta=0.01", "generation.greedy=true", "optimiser=adamw"],
        ["lora={r: 2, alpha: 4}", "gradient_checkpointing=true", "precision=bfloat16", "steps=2"],
    ],
    ids=["spin", "gsil", "lora"],
)
def test_other_kinds_of_self_play_end_in_pairs_that_are_served(
    options: list[str], policy: Path, tmp_path: Path
) -> None:
    assert main(arguments(tmp_path / "run", policy, *options)) == 0
    assert_served(tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["generation.max_new_tokens=90"], "set generation.max_new_tokens to at most"),
        (["max_length_tokens=20"], "tokens, at most 20 (max_length_tokens or the model's own limit)"),
        (
            ["max_length_tokens=97"],
            "max_length_tokens is 97, but the model takes at most 96: set max_length_tokens to 96, or to null",
        ),
        (["rounds=22", "beta=0.1"], "21 demonstrations cannot be shared by 22 rounds"),
        (["beta=[0.1]"], "beta lists 1 values for 2 rounds"),
        (["bernoulli_b=2"], "bernoulli_b belongs to the loss bernoulli"),
        (["rounds=1", "beta=0.1", "previous_rounds=1"], "a single round has no round before"),
        (["lora={dropout: 0.1}"], "lora.dropout must be 0"),
        (["lora={target_modules: [nope]}"], "lora.target_modules: peft cannot adapt these layers"),
        (["policy=no_such_folder"], "no_such_folder: no such checkpoint folder"),
        (["generation.engine=vllm"], "vllm is not installed: pip install"),
        (["generation.temperature=0"], "generation.temperature"),
        (["generation.greedy=true", "generation.top_p=0.5"], "greedy ignores temperature and top_p"),
    ],
)
def test_a_run_that_cannot_be_done_is_refused_in_one_line(
    overrides: list[str], reason: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", policy, *overrides)) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists(), "a corrected configuration may use the same folder"


def test_a_run_does_not_write_over_its_policy(played: Path, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(played.parent / "other", played / "checkpoints" / "sft", f"output_dir={played}")) == 2
    assert "different configuration (policy)" in capsys.readouterr().err
    moved = played.parent / "moved"
    (moved / "checkpoints").mkdir(parents=True)
    (moved / "checkpoints" / "round_1").symlink_to(policy)
    assert main(arguments(moved, moved / "checkpoints" / "round_1")) == 2
    assert "would write over its policy" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["irft_full", "irft_spin_full", "irft_gsil_full"])
def test_a_recipe_for_a_real_model_needs_three_overrides(recipe: str, tmp_path: Path) -> None:
    roomy = tmp_path / "roomy"
    sizes = ScratchOptions(vocabulary=280, hidden_size=16, layers=1, heads=2, max_position_embeddings=2048)
    write_pair(roomy, sizes=sizes)
    rows = [{"question": f"Add {i} and {i}.", "answer": f"It is {2 * i}."} for i in range(6)]
    source = tmp_path / "own.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"policy={roomy / 'sft'}", f"data.source={source}", f"output_dir={tmp_path / 'run'}"]
    assert main(["irft", recipe, *own]) == 0
    assert_served(tmp_path / "run")
