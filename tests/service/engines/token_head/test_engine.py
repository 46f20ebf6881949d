"""Token heads: their values are transformers' own scores of prefixes, in any batch; what is no head is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.checkpoints.adopt import adopt
from dense_reward.engines.token_head.engine import HeadEngine, HeadModel
from dense_reward.engines.token_head.load import load_token_head
from dense_reward.engines.torch.load import LoadContext, ServingOptions
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import check_pair, load_manifest
from dense_reward.records import Branch, Trunk, Wants
from safetensors.torch import load_file, save_file
from tiny_configs import LONG_TOKENS
from tiny_heads import tiny_head, values_of_prefixes, write_files, write_head
from tiny_models import random_trunk, write_checkpoint

TOLERANCE = 1e-5
"""Float32 against float32, in units of values whose standard deviation is about 1."""
OPTIONS = ServingOptions(max_batch_tokens=64)
WEIGHTS = "model.safetensors"


def loaded(folder: Path, options: ServingOptions = OPTIONS) -> HeadEngine:
    return load_token_head(folder, options, LoadContext(lambda _: None))[0]


def values(engine: HeadEngine, trunks: list[Trunk]) -> list[list[np.ndarray]]:
    found = engine.score(trunks, Wants())
    return [[scores.value_S for scores in branches if scores.value_S is not None] for branches in found]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head") / "head"
    write_head(folder)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gpt2", "gemma2"])
def test_the_value_after_a_token_is_the_models_own_score_of_the_text_that_ends_there(
    architecture: str, tmp_path: Path
) -> None:
    write_head(tmp_path / "head", architecture)
    trunks = [random_trunk(1), random_trunk(2, 3, (9, 2)), random_trunk(3, masked=True)]
    spread: list[float] = []
    for trunk, found in zip(trunks, values(loaded(tmp_path / "head"), trunks), strict=True):
        for branch, value_S in zip(trunk.branches, found, strict=True):
            expected_T = np.array(
                values_of_prefixes(tmp_path / "head", trunk.prompt_P.tolist(), branch.ids_T.tolist()), np.float32
            )
            np.testing.assert_allclose(value_S, expected_T[branch.scored_T], atol=TOLERANCE, rtol=TOLERANCE)
            spread.extend(value_S.tolist())
    assert np.std(spread) > 0.1, "values that hardly differ would hide mistakes"


def test_values_do_not_depend_on_batch_mates(head: Path) -> None:
    trunks = [random_trunk(seed, prompt, (4, 17, 1)) for seed, prompt in ((1, 5), (2, 11), (3, 2))]
    together = values(loaded(head), trunks)
    for trunk, found in zip(trunks, together, strict=True):
        for branch, value_S in zip(trunk.branches, found, strict=True):
            (((alone_S),),) = values(loaded(head), [Trunk(trunk.prompt_P, (branch,))])
            np.testing.assert_allclose(value_S, alone_S, atol=TOLERANCE)


def test_deterministic_values_are_bitwise_equal_in_any_batch(head: Path) -> None:
    engine = loaded(head, replace(OPTIONS, deterministic=True))
    trunk = random_trunk(1, 5, (4, 17, 1))
    together = values(engine, [random_trunk(2), trunk])[1]
    for branch, value_S in zip(trunk.branches, together, strict=True):
        (((alone_S),),) = values(engine, [Trunk(trunk.prompt_P, (branch,))])
        np.testing.assert_array_equal(value_S, alone_S)


def test_later_tokens_do_not_change_a_value(head: Path) -> None:
    trunk = random_trunk(1, 5, (12,))
    (branch,) = trunk.branches
    (whole,) = values(loaded(head), [trunk])[0]
    (cut,) = values(loaded(head), [Trunk(trunk.prompt_P, (Branch(branch.ids_T[:5], branch.scored_T[:5]),))])[0]
    np.testing.assert_allclose(whole[:5], cut, atol=TOLERANCE)


def test_lengths_on_two_sides_of_a_rope_limit_share_no_batch(tmp_path: Path) -> None:
    write_head(tmp_path / "head", "longrope")
    engine = loaded(tmp_path / "head", replace(OPTIONS, max_batch_tokens=4096))
    lengths = (LONG_TOKENS - 7, LONG_TOKENS - 6, LONG_TOKENS)
    trunk = random_trunk(1, 7, lengths)
    for branch, value_S in zip(trunk.branches, values(engine, [trunk])[0], strict=True):
        last = values_of_prefixes(tmp_path / "head", trunk.prompt_P.tolist(), branch.ids_T.tolist())[-1]
        assert value_S[-1] == pytest.approx(last, abs=TOLERANCE)


def test_an_empty_response_has_no_values(head: Path) -> None:
    assert [len(value_S) for value_S in values(loaded(head), [random_trunk(1, 3, (0, 2))])[0]] == [0, 2]


def test_the_cost_counts_a_prompt_for_each_response(head: Path) -> None:
    assert loaded(head).cost(random_trunk(1, 7, (5, 0, 11))).branch_tokens == (12, 0, 18)


def test_the_card_says_that_it_is_a_head(head: Path) -> None:
    info = loaded(head).info
    assert (info.sft, info.reference, info.token_head) == (None, None, str(head))
    assert info.quantities == frozenset()


def test_the_revision_is_that_of_the_files(head: Path, tmp_path: Path) -> None:
    write_head(tmp_path / "other", seed=1)
    assert loaded(head).info.revision == loaded(head).info.revision != loaded(tmp_path / "other").info.revision


def broken(head: Path, folder: Path) -> Path:
    shutil.copytree(head, folder)
    return folder


def test_a_probe_of_other_weights_is_refused(head: Path, tmp_path: Path) -> None:
    folder = broken(head, tmp_path / "head")
    content = json.loads((folder / MANIFEST_NAME).read_text())
    numbers = content["probe"][0]["responses"][0]["logprobs"]
    numbers[0] += 1.0
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"token_head is computed wrong: its values differ .* other files"):
        loaded(folder)


def test_a_changed_file_is_refused(head: Path, tmp_path: Path) -> None:
    folder = broken(head, tmp_path / "head")
    weights = load_file(folder / WEIGHTS)
    weights["score.weight"] += 0.1
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not match its hash"):
        loaded(folder)


def test_a_head_without_its_last_layer_is_refused(tmp_path: Path) -> None:
    model = tiny_head()
    write_files(tmp_path / "head", model)
    weights = load_file(tmp_path / "head" / WEIGHTS)
    del weights["score.weight"]
    save_file(weights, tmp_path / "head" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has no scalar head"):
        _adopt(tmp_path / "head")


def test_several_labels_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "head", tiny_head(labels=2))
    with pytest.raises(CheckpointError, match="no layer `score` with one output"):
        _adopt(tmp_path / "head")


def test_a_missing_weight_of_the_backbone_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "head", tiny_head())
    weights = load_file(tmp_path / "head" / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "head" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 weight of the model missing"):
        _adopt(tmp_path / "head")


def test_a_model_that_scores_otherwise_is_refused(tmp_path: Path) -> None:
    model = tiny_head()
    forward = type(model).forward

    class Shifted(type(model)):  # type: ignore[misc] # a class that is chosen at run time
        def forward(self, *args: object, **kwargs: object) -> object:
            output = forward(self, *args, **kwargs)
            output.logits = output.logits + 1.0
            return output

    HeadModel(model)
    model.__class__ = Shifted
    with pytest.raises(CheckpointError, match="scores a text otherwise"):
        HeadModel(model)


def test_a_language_model_is_no_head_and_a_head_is_no_language_model(head: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "sft")
    with pytest.raises(CheckpointError, match="of role sft, not a token head: serve it with --sft and --reference"):
        loaded(tmp_path / "sft")
    shutil.copytree(head, tmp_path / "head")
    (tmp_path / "head" / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="this is a reward, value or classification model"):
        adopt(str(tmp_path / "head"), role="sft", run_id="run", renderer="plain", report=lambda _: None)


def test_a_head_is_no_part_of_a_pair(head: Path, tmp_path: Path) -> None:
    sft = write_checkpoint(tmp_path / "sft")
    for pair in ((load_manifest(head), sft), (sft, load_manifest(head))):
        with pytest.raises(CheckpointError, match="is a token head, a reward model of its own: serve it with --token-"):
            check_pair(*pair, allow_unrelated=True)


def test_a_reward_model_of_another_program_is_adopted_and_told_how_to_be_served(tmp_path: Path) -> None:
    folder, lines = tmp_path / "head", list[str]()
    write_files(folder, tiny_head())
    adopt(str(folder), role="token_head", run_id="run", renderer="plain", report=lines.append)
    assert any(f"dense-reward serve --token-head {folder}" in line for line in lines)
    assert load_manifest(folder).role == "token_head"
    assert loaded(folder).info.token_head == str(folder)
    lines.clear()
    adopt(str(folder), check=True, report=lines.append)
    assert any("matches files, tokenizer, chat template and probe" in line for line in lines)


def test_bfloat16_is_within_its_tolerance(head: Path) -> None:
    lines: list[str] = []
    engine = load_token_head(head, replace(OPTIONS, dtype="bfloat16"), LoadContext(lines.append))[0]
    assert engine.info.dtype == "bfloat16"
    assert engine.model.dtype is torch.bfloat16
    assert any(line.startswith("probe of token_head: rms difference") for line in lines)


def test_the_manifest_stores_values_for_its_probe(head: Path) -> None:
    manifest = load_manifest(head)
    sequence = manifest.probe[0]
    response = sequence.responses[0]
    expected = values_of_prefixes(head, sequence.prompt_ids, response.ids)
    assert response.logprobs == pytest.approx(expected, abs=TOLERANCE)


def _adopt(folder: Path) -> None:
    adopt(str(folder), role="token_head", run_id="run", renderer="plain", report=lambda _: None)
