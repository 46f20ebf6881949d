"""`dense-reward check`: how much of a reward is rounding, and what lowers it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dense_reward.checkpoints.probe import PROBE_TEXTS, probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts, write_manifest
from dense_reward.cli import main
from dense_reward.engines.torch import noise
from dense_reward.engines.torch.load import ServingOptions
from dense_reward.engines.torch.noise import AS_SERVED, Noise, exact_rewards, measure_noise
from dense_reward.errors import CheckpointError
from tiny_models import write_pair, write_tokenizer
from transformers import AutoModelForCausalLM

Pair = tuple[Path, Path]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("noisy"), dtype=torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Iterator[None]:
    """The batches whose time is measured are small here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "TIMED_SHAPE", (8, 2, 8))
        patch.setattr(noise, "TIMED_RUNS", 1)
        yield


@pytest.fixture(scope="module")
def found(pair: Pair) -> dict[str, Noise]:
    """What `measure_noise` finds for a pair that is served in bfloat16."""
    return measured(pair, ServingOptions(dtype="bfloat16", max_batch_tokens=1000))


def measured(pair: Pair, serving: ServingOptions) -> dict[str, Noise]:
    exact = exact_rewards(*pair, serving, lambda _: None)
    return {each.name: each for each in measure_noise(*pair, serving, exact, lambda _: None)}


def noise_of(found: dict[str, Noise], name: str) -> float:
    value = found[name].noise
    assert value is not None
    return value


def test_short_weights_make_noise_that_more_bits_lower_and_float32_has_none(found: dict[str, Noise]) -> None:
    assert noise_of(found, "float32 weights") < 1e-5
    assert noise_of(found, "float16 weights") < noise_of(found, AS_SERVED) / 3
    assert 0 < noise_of(found, "float32 head") < noise_of(found, AS_SERVED)
    assert noise_of(found, "float32 head and norms") < noise_of(found, AS_SERVED)


def test_a_float32_head_costs_memory_and_every_configuration_has_its_time(found: dict[str, Noise]) -> None:
    weights = {name: each.weights_bytes or 0 for name, each in found.items()}
    assert weights["float32 head"] > weights[AS_SERVED]
    assert weights["float32 weights"] == 2 * weights[AS_SERVED]
    assert all(each.seconds and each.seconds > 0 for each in found.values())


def test_nothing_lowers_the_noise_of_what_is_served_in_float32(pair: Pair) -> None:
    assert list(measured(pair, ServingOptions(dtype="float32", max_batch_tokens=1000))) == [AS_SERVED]


def test_checkpoints_that_differ_only_elsewhere_have_no_reward_to_measure_noise_in(pair: Pair, tmp_path: Path) -> None:
    serving = ServingOptions(dtype="float32", max_batch_tokens=1000)
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    with torch.no_grad():
        model.model.embed_tokens.weight[257] += 1.0  # <pad>, which no probe holds
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    facts = ManifestFacts(role="reference", run_id="run", renderer="plain", optimiser_step=10)
    write_manifest(tmp_path, facts, lambda encoder, limit: probe_of_texts(encoder, limit, PROBE_TEXTS[:2]))
    with pytest.raises(CheckpointError, match="the two checkpoints hardly differ"):
        exact_rewards(pair[0], tmp_path, serving, lambda _: None)


def test_the_command_prints_a_line_for_each_configuration_of_the_first_pair(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"name": name, "sft": str(pair[0]), "reference": str(pair[1])} for name in ("early", "late")]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    arguments = ["check", "--pairs-file", str(tmp_path / "pairs.json"), "--dtype", "bfloat16", "--device=cpu"]
    assert main([*arguments, "--max-batch-tokens", "1000"]) == 0
    printed = capsys.readouterr()
    assert "std(float32 reward)" in printed.out
    assert [line.split("  ")[0] for line in printed.out.splitlines()[4:]] == [
        AS_SERVED,
        "no packed weights",
        "no compiled kernels",
        "float32 head",
        "float32 norms",
        "float32 head and norms",
        "float16 weights",
        "float16 weights, float32 head",
        "float32 weights",
    ]
    assert "measuring early, the first of 2 pairs" in printed.err
    assert "path: packed" in printed.err
