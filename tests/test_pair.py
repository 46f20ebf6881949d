"""Both checkpoints together: results independent of batch mates, and the proof without which nothing is served."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.engine.base import Branch, EngineInfo, TokenScores, Trunk, Wants
from dense_reward.engine.pair import QUANTITIES, PairEngine, load_pair
from dense_reward.engine.tokenizer import TransformersTokenizer
from dense_reward.engine.torch_engine import TorchModel
from dense_reward.errors import CheckpointError
from dense_reward.manifest import MANIFEST_NAME, Manifest, hash_files
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    LONG_TOKENS,
    MAX_LENGTH_TOKENS,
    VOCABULARY,
    copy_pair,
    plain_logprobs,
    random_trunk,
    tiny_model,
    write_checkpoint,
    write_pair,
)

Pair = tuple[Path, Path]
ALL = Wants(kl=True, entropy=True, top_k=3)
TOLERANCE_NATS = 5e-5
"""Between a sequence alone and in any batch, in float32, on models whose log-probs spread over nats."""


def engine_of(name: str, *, max_batch_tokens: int = 1000, dtype: torch.dtype = torch.float32) -> PairEngine:
    sft, reference = (TorchModel(tiny_model(name, seed=seed, dtype=dtype)) for seed in (1, 2))
    info = EngineInfo(
        "sft", "reference", "r", str(dtype)[6:], "cpu", VOCABULARY, MAX_LENGTH_TOKENS, QUANTITIES, related=True
    )
    return PairEngine(sft, reference, info, max_batch_tokens=max_batch_tokens)


def alone(engine: PairEngine, trunk: Trunk, branch: Branch) -> TokenScores:
    return engine.score([Trunk(trunk.prompt_P, (branch,))], ALL)[0][0]


def assert_same(found: TokenScores, expected: TokenScores) -> None:
    """All but the ids of the likeliest tokens, which rounding may exchange."""
    for field in fields(TokenScores):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None), field.name
        if a is not None and field.name not in {"top_ids_SK", "top_reference_logprob_SK"}:
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, atol=TOLERANCE_NATS, rtol=0, err_msg=field.name)


@st.composite
def batches(draw: st.DrawFn) -> list[Trunk]:
    """Prompts with two or more responses each, of unequal lengths, some empty, some masked."""
    return [
        random_trunk(
            draw(st.integers(0, 2**20)),
            draw(st.integers(1, 40)),
            tuple(draw(st.lists(st.integers(0, 30), min_size=2, max_size=4))),
            masked=draw(st.booleans()),
            k=draw(st.integers(0, 3)),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]


ENGINES = {
    name: engine_of(name, max_batch_tokens=150) for name in ("llama", "gemma2", "mixtral", "minicpm3", "longrope")
}


@pytest.mark.parametrize("name", ENGINES)
@settings(deadline=None, max_examples=20, derandomize=True)  # rounding may send a token to another expert, once in ages
@given(trunks=batches())
def test_a_sequence_gets_the_same_scores_in_any_batch(name: str, trunks: list[Trunk]) -> None:
    scores = ENGINES[name].score(trunks, ALL)
    assert [len(branches) for branches in scores] == [len(trunk.branches) for trunk in trunks]
    for trunk, of_trunk in zip(trunks, scores, strict=True):
        for branch, found in zip(trunk.branches, of_trunk, strict=True):
            assert len(found.sft_logprob_S) == branch.scored_T.sum()
            assert_same(found, alone(ENGINES[name], trunk, branch))


def test_the_scores_are_those_of_plain_transformers() -> None:
    sft, reference = (tiny_model("llama", seed=seed, dtype=torch.float32) for seed in (1, 2))
    trunk = random_trunk(4, 11, (9, 0, 14), masked=True, k=2)
    for branch, found in zip(trunk.branches, ENGINES["llama"].score([trunk], ALL)[0], strict=True):
        p, q = (
            plain_logprobs(model, trunk.prompt_P, branch.ids_T)[torch.from_numpy(branch.scored_T)]
            for model in (sft, reference)
        )
        ids_S1 = torch.from_numpy(branch.ids_T[branch.scored_T]).long()[:, None]
        assert found.kl_S is not None
        np.testing.assert_allclose(found.sft_logprob_S, p.gather(1, ids_S1)[:, 0].numpy(), atol=1e-4)
        np.testing.assert_allclose(found.reference_logprob_S, q.gather(1, ids_S1)[:, 0].numpy(), atol=1e-4)
        np.testing.assert_allclose(found.kl_S, (p.exp() * (p - q)).sum(1).numpy(), atol=1e-4)


def test_sequences_on_both_sides_of_a_longrope_border_are_each_turned_their_own_way() -> None:
    short, long = random_trunk(1, 10, (5, LONG_TOKENS - 10)), random_trunk(2, 10, (LONG_TOKENS - 9, 40))
    together = ENGINES["longrope"].score([short, long], Wants())
    plain = tiny_model("longrope", seed=1, dtype=torch.float32)
    for trunk, of_trunk in zip((short, long), together, strict=True):
        for branch, found in zip(trunk.branches, of_trunk, strict=True):
            ids_S1 = torch.from_numpy(branch.ids_T).long()[:, None]
            expected = plain_logprobs(plain, trunk.prompt_P, branch.ids_T).gather(1, ids_S1)[:, 0]
            np.testing.assert_allclose(found.sft_logprob_S, expected.numpy(), atol=1e-4)


def test_arrays_come_in_the_dtypes_of_the_contract_and_only_where_asked_for() -> None:
    engine = engine_of("llama", dtype=torch.float64)
    trunk = random_trunk(0, 3, (4, 0), k=2)
    for scores in engine.score([trunk], ALL)[0]:
        dtypes = {field.name: getattr(scores, field.name).dtype for field in fields(TokenScores)}
        assert dtypes.pop("top_ids_SK") == np.int32
        assert set(dtypes.values()) == {np.dtype(np.float32)}
    plain = engine.score([random_trunk(0, 3, (4,))], Wants())[0][0]
    assert [f.name for f in fields(TokenScores) if getattr(plain, f.name) is not None] == [
        "sft_logprob_S",
        "reference_logprob_S",
    ]


def test_each_branch_gets_the_candidates_that_it_named_whatever_its_mates_name() -> None:
    many, few, none = (random_trunk(seed, 5, (6, 3), k=k) for seed, k in ((1, 5), (2, 1), (3, 0)))
    scores = ENGINES["llama"].score([many, none, few], Wants())
    widths = [[None if s.candidate_reward_SK is None else s.candidate_reward_SK.shape for s in row] for row in scores]
    assert widths == [[(6, 5), (3, 5)], [None, None], [(6, 1), (3, 1)]]
    alone_few = ENGINES["llama"].score([few], Wants())[0][0].candidate_reward_SK
    found = scores[2][0].candidate_reward_SK
    assert found is not None
    assert alone_few is not None
    np.testing.assert_allclose(found, alone_few, atol=TOLERANCE_NATS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"))


def load(
    pair: Pair, *, dtype: str | None = None, allow_unrelated: bool = False, reports: list[str] | None = None
) -> tuple[PairEngine, TransformersTokenizer, Manifest]:
    return load_pair(
        *pair,
        dtype=dtype,
        device="cpu",
        max_batch_tokens=1000,
        allow_unrelated=allow_unrelated,
        report=(lambda _: None) if reports is None else reports.append,
    )


def edit_manifest(checkpoint: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = checkpoint / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_sound_pair_is_loaded_proven_and_described(pair: Pair) -> None:
    reports: list[str] = []
    engine, tokenizer, manifest = load(pair, reports=reports)
    assert engine.info == EngineInfo(
        sft=str(pair[0]),
        reference=str(pair[1]),
        revision=engine.info.revision,
        dtype="float32",
        device="cpu",
        vocabulary=VOCABULARY,
        max_length_tokens=MAX_LENGTH_TOKENS,
        quantities=QUANTITIES,
        related=True,
    )
    assert tokenizer.sha256() == manifest.tokenizer_sha256
    assert [line.split(":")[0] for line in reports if line.startswith("probe")] == [
        "probe of sft",
        "probe of reference",
    ]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_the_proof_holds_in_other_dtypes_within_their_rounding(pair: Pair, dtype: str) -> None:
    assert load(pair, dtype=dtype)[0].info.dtype == dtype


def test_a_revision_names_the_files_of_both_and_how_they_are_served(pair: Pair, tmp_path: Path) -> None:
    revision = load(pair)[0].info.revision
    assert load(copy_pair(pair, tmp_path))[0].info.revision == revision
    assert load(pair, dtype="float32")[0].info.revision == revision
    assert load(pair, dtype="float64")[0].info.revision != revision
    assert load((pair[0], pair[0]), allow_unrelated=True)[0].info.revision != revision


@pytest.mark.parametrize("side", [0, 1], ids=["sft", "reference"])
def test_another_configuration_is_another_revision(pair: Pair, tmp_path: Path, side: int) -> None:
    changed = copy_pair(pair, tmp_path)
    path = changed[side] / "config.json"
    path.write_text(path.read_text() + "\n")
    edit_manifest(changed[side], lambda manifest: manifest.update(files=hash_files(changed[side])))
    assert load(changed)[0].info.revision != load(pair)[0].info.revision


def test_another_end_of_turn_is_another_revision(pair: Pair, tmp_path: Path) -> None:
    changed = copy_pair(pair, tmp_path)
    for checkpoint in changed:
        edit_manifest(checkpoint, lambda manifest: manifest.update(end_of_turn_id=3))
    assert load(changed)[0].info.revision != load(pair)[0].info.revision


def test_a_checkpoint_against_itself_gives_a_reward_and_a_kl_of_exactly_0(pair: Pair) -> None:
    engine = load((pair[0], pair[0]), allow_unrelated=True)[0]
    for scores in engine.score([random_trunk(1, 6, (8, 3))], ALL)[0]:
        assert np.array_equal(scores.sft_logprob_S, scores.reference_logprob_S)
        assert scores.kl_S is not None
        assert not scores.kl_S.any()


def test_swapped_checkpoints_are_refused(pair: Pair) -> None:
    with pytest.raises(CheckpointError, match="given as sft is a reference, the one given as reference a sft"):
        load((pair[1], pair[0]))


def test_checkpoints_of_different_runs_make_a_pair_only_where_that_is_wanted(pair: Pair, tmp_path: Path) -> None:
    sft, reference = copy_pair(pair, tmp_path)
    edit_manifest(reference, lambda manifest: manifest.update(run_id="another"))
    with pytest.raises(CheckpointError, match=r"different runs \(run and another\): pass --allow-unrelated"):
        load((sft, reference))
    assert not load((sft, reference), allow_unrelated=True)[0].info.related


@pytest.mark.parametrize("role", ["sft", "reference"])
def test_weights_that_compute_something_else_than_the_probe_are_refused(pair: Pair, tmp_path: Path, role: str) -> None:
    broken = copy_pair(pair, tmp_path)

    def change(manifest: dict[str, object]) -> None:
        probe = manifest["probe"]
        assert isinstance(probe, list)
        probe[0]["responses"][0]["logprobs"][0] -= 0.5

    edit_manifest(broken[role == "reference"], change)
    with pytest.raises(CheckpointError, match=rf"{role} is computed wrong: .* \d.* nats \(rms, at most 0.001"):
        load(broken)


@pytest.mark.parametrize("probe", [[], [{"prompt_ids": [1], "responses": []}], "empty responses"])
def test_a_probe_that_proves_nothing_is_refused(pair: Pair, tmp_path: Path, probe: list[object] | str) -> None:
    broken = copy_pair(pair, tmp_path)
    empty = [{"prompt_ids": [1], "responses": [{"ids": [], "logprobs": []}]}]
    edit_manifest(broken[1], lambda manifest: manifest.update(probe=empty if isinstance(probe, str) else probe))
    with pytest.raises(CheckpointError, match="the manifest of reference has an empty probe: adopt"):
        load(broken)


def test_a_probe_of_nan_proves_nothing(pair: Pair, tmp_path: Path) -> None:
    broken = copy_pair(pair, tmp_path)
    nan = [{"prompt_ids": [1], "responses": [{"ids": [2], "logprobs": [float("nan")]}]}]
    edit_manifest(broken[0], lambda manifest: manifest.update(probe=nan))
    with pytest.raises(CheckpointError, match="sft is computed wrong"):
        load(broken)


def test_another_tokenizer_in_the_reference_is_refused(pair: Pair, tmp_path: Path) -> None:
    other = tmp_path / "reference"
    write_checkpoint(other, role="reference", step=10, specials=("<end>", "<pad>"))
    with pytest.raises(CheckpointError, match="different tokenizers"):
        load((pair[0], other), allow_unrelated=True)


def test_another_template_in_the_reference_is_refused(pair: Pair, tmp_path: Path) -> None:
    other = tmp_path / "reference"
    write_checkpoint(other, role="reference", step=10, renderer="chat")
    with pytest.raises(
        CheckpointError, match="different chat templates or ends of turn: adopt both with --renderer plain"
    ):
        load((pair[0], other), allow_unrelated=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha256": "0" * 64}, "its tokenizer is not the one of its manifest"),
        ({"template_sha256": "0" * 64}, "its chat template is not the one of its manifest"),
        ({"vocabulary": VOCABULARY + 8}, "output rows, its manifest says"),
    ],
)
def test_manifests_that_agree_with_each_other_but_not_with_the_files_are_refused(
    pair: Pair, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    broken = copy_pair(pair, tmp_path)
    for checkpoint in broken:
        edit_manifest(checkpoint, lambda manifest: manifest.update(changes))
    with pytest.raises(CheckpointError, match=message):
        load(broken)


def test_files_are_verified_before_any_weights_are_loaded(pair: Pair, tmp_path: Path) -> None:
    broken = copy_pair(pair, tmp_path)
    flip_a_byte(broken[0] / "model.safetensors")
    reports: list[str] = []
    with pytest.raises(CheckpointError, match=r"sft/model.safetensors does not match its hash"):
        load(broken, reports=reports)
    assert len(reports) == 1


def flip_a_byte(path: Path, at: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
