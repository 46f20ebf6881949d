"""Two checkpoints become a pair only if they belong together and their stored probes are reproduced."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.checkpoints.probe import PROBE_TEXTS, probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts, write_manifest
from dense_reward.engines import proof
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.engines.torch import load, packing_check
from dense_reward.engines.torch.device import CPU_CAPABILITIES
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.pair import QUANTITIES, ComputeOptions, PairEngine
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME, hash_files
from dense_reward.manifest import Manifest
from dense_reward.records import EngineInfo, TokenScores, Wants
from tiny_configs import MAX_LENGTH_TOKENS, VOCABULARY
from tiny_models import copy_pair, random_trunk, write_checkpoint, write_pair
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

Pair = tuple[Path, Path]
ALL = Wants(kl=True, entropy=True, varentropy=True, top_k=3)
SERVING = ServingOptions(max_batch_tokens=1000)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"))


def loaded(
    pair: Pair, *, reports: list[str] | None = None, **changes: object
) -> tuple[PairEngine, TransformersTokenizer, Manifest]:
    report = (lambda _: None) if reports is None else reports.append
    return load_pair(*pair, replace(SERVING, **changes), LoadContext(report))  # type: ignore[arg-type]


def scores_of(engine: PairEngine, wants: Wants = ALL) -> list[TokenScores]:
    return [scores for seed in range(3) for scores in engine.score([random_trunk(seed, 6, (8, 3, 14))], wants)[0]]


def rewards_of(engine: PairEngine) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.concatenate([s.sft_logprob_S - s.reference_logprob_S for s in scores_of(engine)])


def edit_manifest(checkpoint: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = checkpoint / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shift_probe(manifest: dict[str, object], nats: float) -> None:
    probe = manifest["probe"]
    assert isinstance(probe, list)
    for sequence in probe:
        for response in sequence["responses"]:
            response["logprobs"] = [logprob - nats for logprob in response["logprobs"]]


def test_a_sound_pair_is_loaded_proven_and_described(pair: Pair) -> None:
    reports: list[str] = []
    engine, tokenizer, manifest = loaded(pair, reports=reports)
    assert engine.info == EngineInfo(
        sft=str(pair[0]),
        reference=str(pair[1]),
        revision=engine.info.revision,
        dtype="float32",
        device="cpu",
        vocab_size=VOCABULARY,
        max_length_tokens=MAX_LENGTH_TOKENS,
        quantities=QUANTITIES,
        related=True,
    )
    assert tokenizer.sha256() == manifest.tokenizer_sha256
    assert [line.split(":")[0] for line in reports[-2:]] == ["probe of sft", "probe of reference"]
    assert "path: packed" in reports
    (memory,) = [line for line in reports if line.startswith("memory: ")]
    assert "weights 0 MB; a batch of 1000 tokens up to " in memory


def test_nothing_but_reports_is_written_between_the_lines_of_a_log(
    pair: Pair, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded(pair)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_the_proof_holds_in_other_dtypes_within_their_rounding(pair: Pair, dtype: str) -> None:
    assert loaded(pair, dtype=dtype)[0].info.dtype == dtype


def test_a_revision_names_the_files_of_both_and_how_they_are_served(pair: Pair, tmp_path: Path) -> None:
    revision = loaded(pair)[0].info.revision
    assert loaded(copy_pair(pair, tmp_path))[0].info.revision == revision
    assert loaded(pair, dtype="float32")[0].info.revision == revision
    assert loaded(pair, reference_device="cpu", max_batch_tokens=500)[0].info.revision == revision
    assert loaded(pair, dtype="float64")[0].info.revision != revision
    assert loaded(pair, head_dtype="float64")[0].info.revision != revision
    assert loaded(pair, norm_dtype="float64")[0].info.revision != revision
    assert loaded(pair, deterministic=True)[0].info.revision != revision


@pytest.mark.parametrize("side", [0, 1], ids=["sft", "reference"])
def test_another_configuration_is_another_revision(pair: Pair, tmp_path: Path, side: int) -> None:
    changed = copy_pair(pair, tmp_path)
    path = changed[side] / "config.json"
    path.write_text(path.read_text() + "\n")
    edit_manifest(changed[side], lambda manifest: manifest.update(files=hash_files(changed[side])))
    assert loaded(changed)[0].info.revision != loaded(pair)[0].info.revision


def test_another_end_of_turn_is_another_revision(pair: Pair, tmp_path: Path) -> None:
    changed = copy_pair(pair, tmp_path)
    for checkpoint in changed:
        edit_manifest(checkpoint, lambda manifest: manifest.update(end_of_turn_id=3))
    assert loaded(changed)[0].info.revision != loaded(pair)[0].info.revision


def test_a_model_against_itself_gives_a_reward_and_a_kl_of_exactly_0(pair: Pair) -> None:
    engine = loaded(pair)[0]
    sft = engine.models[0]
    engine = PairEngine(sft, sft, engine.info, ComputeOptions(1000, packed=True))
    for scores in engine.score([random_trunk(1, 6, (8, 3))], ALL)[0]:
        assert np.array_equal(scores.sft_logprob_S, scores.reference_logprob_S)
        assert scores.kl_S is not None
        assert not scores.kl_S.any()


@pytest.mark.parametrize("saved_as", ["shards", "bfloat16"])
def test_a_copy_of_a_model_is_refused_however_it_is_saved(tmp_path: Path, saved_as: str) -> None:
    """No hash tells, and the stored probes differ: both checkpoints were measured in float32."""
    sft, reference = tmp_path / "sft", tmp_path / "reference"
    made = write_checkpoint(sft, seed=1, step=20)
    write_checkpoint(reference, role="reference", seed=1, step=10)
    model = AutoModelForCausalLM.from_pretrained(sft, dtype=torch.bfloat16 if saved_as == "bfloat16" else torch.float32)
    (reference / "model.safetensors").unlink()
    model.save_pretrained(reference, max_shard_size="10KB" if saved_as == "shards" else "1GB")
    facts = ManifestFacts(role="reference", run_id="run", renderer="plain", optimiser_step=10)
    other = write_manifest(reference, facts, lambda encoder, limit: probe_of_texts(encoder, limit, PROBE_TEXTS[:2]))
    assert (other.weights_sha256, other.probe) != (made.weights_sha256, made.probe)
    with pytest.raises(CheckpointError, match="every reward would be 0: name an earlier checkpoint"):
        loaded((sft, reference), allow_unrelated=True)


def test_swapped_checkpoints_are_told_to_be_swapped(pair: Pair) -> None:
    with pytest.raises(CheckpointError, match="sft is a reference, and the one given as reference is an sft: swap"):
        loaded((pair[1], pair[0]))


def test_a_wrong_model_in_a_short_dtype_is_told_from_rounding(pair: Pair, tmp_path: Path) -> None:
    """Served in bfloat16: an exact probe that bfloat16 misses is rounding, a probe that float32 misses too is not."""
    wrong = copy_pair(pair, tmp_path)
    edit_manifest(wrong[0], lambda manifest: shift_probe(manifest, 2.0))
    with pytest.raises(CheckpointError, match=r"in float32 it differs too .* not rounding: the probe was measured"):
        loaded(wrong, dtype="bfloat16")


def test_rounding_of_a_short_dtype_is_told_from_a_wrong_model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(proof.PROBE_TOLERANCE_NATS, "bfloat16", 1e-4)
    cure = "computed in float32 it matches .* rounding of bfloat16: serve it with --dtype float32"
    with pytest.raises(CheckpointError, match=cure):
        loaded(pair, dtype="bfloat16")


def test_a_wrong_way_of_computing_a_batch_is_told_from_wrong_files(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = TorchModel.packed_rows
    monkeypatch.setattr(load, "unsupported_reason", lambda *_, **__: None)
    monkeypatch.setattr(TorchModel, "packed_rows", lambda model, row: rows(model, row) * 1.5)
    with pytest.raises(CheckpointError, match="neither the files nor rounding are the cause, but how this service"):
        loaded(pair, dtype="float32")


def test_checkpoints_of_different_runs_make_a_pair_only_where_that_is_wanted(pair: Pair, tmp_path: Path) -> None:
    sft, reference = copy_pair(pair, tmp_path)
    edit_manifest(reference, lambda manifest: manifest.update(run_id="another"))
    with pytest.raises(CheckpointError, match=r"different runs \(run and another\): pass --allow-unrelated"):
        loaded((sft, reference))
    assert not loaded((sft, reference), allow_unrelated=True)[0].info.related


@pytest.mark.parametrize("role", ["sft", "reference"])
def test_weights_that_compute_something_else_than_the_probe_are_refused(pair: Pair, tmp_path: Path, role: str) -> None:
    broken = copy_pair(pair, tmp_path)

    def change(manifest: dict[str, object]) -> None:
        probe = manifest["probe"]
        assert isinstance(probe, list)
        probe[0]["responses"][0]["logprobs"][0] -= 0.5

    edit_manifest(broken[role == "reference"], change)
    with pytest.raises(CheckpointError, match=rf"{role} is computed wrong: .* \d.* nats \(rms, at most 0.001"):
        loaded(broken)


@pytest.mark.parametrize("probe", [[], [{"prompt_ids": [1], "responses": []}], "empty responses"])
def test_a_probe_that_proves_nothing_is_refused(pair: Pair, tmp_path: Path, probe: list[object] | str) -> None:
    broken = copy_pair(pair, tmp_path)
    empty = [{"prompt_ids": [1], "responses": [{"ids": [], "logprobs": []}]}]
    edit_manifest(broken[1], lambda manifest: manifest.update(probe=empty if isinstance(probe, str) else probe))
    with pytest.raises(CheckpointError, match="the manifest of reference has an empty probe: adopt"):
        loaded(broken)


def test_a_probe_of_nan_proves_nothing(pair: Pair, tmp_path: Path) -> None:
    broken = copy_pair(pair, tmp_path)
    nan = [{"prompt_ids": [1], "responses": [{"ids": [2], "logprobs": [float("nan")]}]}]
    edit_manifest(broken[0], lambda manifest: manifest.update(probe=nan))
    with pytest.raises(CheckpointError, match=r"logprobs\.0: Input should be a finite number"):
        loaded(broken)


def test_another_tokenizer_in_the_reference_is_refused(pair: Pair, tmp_path: Path) -> None:
    other = tmp_path / "reference"
    write_checkpoint(other, role="reference", step=10, specials=("<end>", "<pad>"))
    with pytest.raises(CheckpointError, match="different tokenizers"):
        loaded((pair[0], other), allow_unrelated=True)


def test_a_pair_in_two_dtypes_is_served_with_a_line_that_says_so(pair: Pair, tmp_path: Path) -> None:
    """A base model that was adopted in bfloat16 is rounded, the sft model after it is not."""
    mixed = copy_pair(pair, tmp_path)
    edit_manifest(mixed[1], lambda manifest: manifest.update(dtype="float64"))
    reports: list[str] = []
    loaded(mixed, reports=reports)
    assert [
        line for line in reports if "--dtype" in line and "sft is computed in float32, the reference in float64" in line
    ]
    loaded(pair, reports=(reports := []))
    assert not [line for line in reports if "is computed in" in line]


def test_another_template_in_the_reference_is_refused(pair: Pair, tmp_path: Path) -> None:
    other = tmp_path / "reference"
    write_checkpoint(other, role="reference", step=10, renderer="chat")
    with pytest.raises(CheckpointError, match="different chat templates: adopt both with --renderer plain"):
        loaded((pair[0], other), allow_unrelated=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha256": "0" * 64}, "its tokenizer is not the one of its manifest"),
        ({"template_sha256": "0" * 64}, "its chat template is not the one of its manifest"),
        ({"vocabulary": VOCABULARY + 8}, "output rows, but its manifest states"),
    ],
)
def test_manifests_that_agree_with_each_other_but_not_with_the_files_are_refused(
    pair: Pair, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    broken = copy_pair(pair, tmp_path)
    for checkpoint in broken:
        edit_manifest(checkpoint, lambda manifest: manifest.update(changes))
    with pytest.raises(CheckpointError, match=message):
        loaded(broken)


def test_files_are_verified_before_any_weights_are_loaded(pair: Pair, tmp_path: Path) -> None:
    broken = copy_pair(pair, tmp_path)
    flip_a_byte(broken[0] / "model.safetensors")
    reports: list[str] = []
    with pytest.raises(CheckpointError, match=r"sft/model.safetensors does not match its hash"):
        loaded(broken, reports=reports)
    assert len(reports) == 1


@pytest.mark.parametrize(("architecture", "path"), [("gemma2", "packed"), ("lfm2", "padded"), ("roberta", "padded")])
def test_a_pair_is_proven_by_the_path_that_its_architecture_allows_and_the_path_is_told(
    architecture: str, path: str, tmp_path: Path
) -> None:
    reports: list[str] = []
    engine, _, _ = loaded(write_pair(tmp_path, architecture), reports=reports)
    (reported,) = [line for line in reports if line.startswith("path: ")]
    assert reported.startswith("path: packed" if path == "packed" else "path: padded, several times slower, because ")
    assert engine._compute_options.packed == (path == "packed")
    assert reports[-1].startswith("probe of reference: ")


def test_one_model_that_cannot_be_packed_has_both_padded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter([None, "the second is odd"])
    monkeypatch.setattr(load, "unsupported_reason", lambda *_, **__: next(reasons))
    reports: list[str] = []
    assert not loaded(pair, reports=reports)[0]._compute_options.packed
    assert "path: padded, several times slower, because the second is odd" in reports


def test_a_path_that_computes_something_else_is_refused_by_the_probe_though_nobody_noticed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "unsupported_reason", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match=r"sft is computed wrong: .* nats \(rms, at most 0.001"):
        loaded(write_pair(tmp_path, "roberta"))


def test_both_models_are_asked_on_the_device_and_in_the_dtype_that_serves_them(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def noted(*_: object, device: str, dtype: torch.dtype) -> None:
        calls.append((device, dtype))

    monkeypatch.setattr(load, "unsupported_reason", noted)
    loaded(pair, dtype="bfloat16", reference_device="cpu:0")
    assert calls == [("cpu", torch.bfloat16), ("cpu:0", torch.bfloat16)]


def test_a_kernel_that_is_wrong_on_its_device_alone_has_the_pair_padded(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_check, "_kernel_reason", lambda *_: "the kernels of it are off")
    reports: list[str] = []
    loaded(pair, device="cpu:0", reports=reports)
    assert "path: padded, several times slower, because the kernels of it are off" in reports


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("has_it", [True, False])
@pytest.mark.parametrize("architecture", ["x86_64", "arm64"])
def test_short_weights_are_served_in_float32_where_the_processor_lacks_their_arithmetic(
    dtype: str, has_it: bool, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path, dtype=getattr(torch, dtype))
    one_dnn = {"x86_64": True, "arm64": has_it}  # on x86 it also answers yes for AVX-512 that only emulates bfloat16
    found = {"architecture": architecture, "avx512_f": True, CPU_CAPABILITIES[dtype][0]: has_it}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: one_dnn[architecture])
    reports: list[str] = []
    assert loaded(pair, reports=reports)[0].info.dtype == (dtype if has_it else "float32")
    reported = f"the {dtype} weights of sft are served in float32, which holds them exactly"
    assert any(line.startswith(reported) for line in reports) != has_it
    assert loaded(pair, dtype=dtype)[0].info.dtype == dtype


def test_a_sequence_must_fit_into_a_batch_and_that_it_must_is_told(pair: Pair) -> None:
    reports: list[str] = []
    engine, _, _ = loaded(pair, reports=reports, max_batch_tokens=200)
    assert engine.info.max_length_tokens == 200
    assert f"sequences of up to 200 of the models' {MAX_LENGTH_TOKENS} tokens (--max-batch-tokens)" in reports
    assert loaded(pair, max_batch_tokens=MAX_LENGTH_TOKENS)[0].info.max_length_tokens == MAX_LENGTH_TOKENS


def test_a_reference_on_a_device_of_its_own_gives_the_same(pair: Pair) -> None:
    for found, expected in zip(
        scores_of(loaded(pair, reference_device="cpu:0")[0]), scores_of(loaded(pair)[0]), strict=True
    ):
        assert found.kl_S is not None
        assert expected.kl_S is not None
        assert np.array_equal(found.reference_logprob_S, expected.reference_logprob_S)
        assert np.array_equal(found.kl_S, expected.kl_S)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "lfm2"])
def test_heads_and_norms_in_float32_serve_short_weights_with_no_more_noise(architecture: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, architecture, torch.bfloat16)
    exact = rewards_of(loaded(pair, dtype="float32")[0])
    served, head, both = (
        float(np.std(rewards_of(loaded(pair, dtype="bfloat16", head_dtype=head, norm_dtype=norm)[0]) - exact))
        for head, norm in ((None, None), ("float32", None), ("float32", "float32"))
    )
    assert 0 < head < 1.05 * served
    assert 0 < both < 1.05 * served


def test_a_head_copied_in_float32_is_used_by_both_models(pair: Pair) -> None:
    engine = loaded(pair, dtype="bfloat16", head_dtype="float32")[0]
    for model in (engine._sft, engine._reference):
        assert model.head.logits(torch.zeros(1, 32, dtype=torch.bfloat16), slice(0, 3)).dtype == torch.float32
    assert engine.weights_bytes > loaded(pair, dtype="bfloat16")[0].weights_bytes


def test_deterministic_service_computes_each_sequence_alone_and_says_so(pair: Pair) -> None:
    reports: list[str] = []
    engine, _, _ = loaded(pair, reports=reports, deterministic=True)
    assert "deterministic: each sequence is computed alone, its prompt too" in reports
    assert engine._compute_options.alone
    trunk = random_trunk(0, 9, (7, 7))
    (together,) = engine.score([trunk], ALL)
    for branch, scores in zip(trunk.branches, together, strict=True):
        (single,) = engine.score([replace(trunk, branches=(branch,))], ALL)[0]
        assert single.sft_logprob_S.tobytes() == scores.sft_logprob_S.tobytes()


def flip_a_byte(path: Path, at: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
