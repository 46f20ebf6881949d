"""A user who adopts a checkpoint again repeats nothing, and what cannot be kept for certain is asked for."""

import json
from pathlib import Path

import pytest
import torch
from dense_reward.checkpoints.adopt import adopt
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import Manifest, load_manifest, verify_files
from kinds_of_templates import KINDS
from tiny_models import tiny_model, write_tokenizer

SPECIALS = ("<|im_end|>", "<|im_start|>", "<|stop|>")
NO_THOUGHT = {"enable_thinking": False}
RECORD = {"optimiser_step": 7, "samples_processed": 56, "samples_total": 112, "data_sha256": "d", "seed": 3}


def made(folder: Path, kind: str = "an empty thought", seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(seed=seed, dtype=torch.float32)
    model.resize_token_embeddings(256 + len(SPECIALS), mean_resizing=False)
    model.save_pretrained(folder)
    write_tokenizer(folder, specials=SPECIALS, template=KINDS[kind])
    return folder


def again(folder: Path, **options: object) -> tuple[Manifest, list[str]]:
    """The manifest after another adoption, and what that has reported."""
    lines: list[str] = []
    return load_manifest(adopt(str(folder), report=lines.append, **options)), lines  # type: ignore[arg-type]


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        adopt(str(folder), **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_decision_is_added_without_repeating_role_and_run(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    adopt(str(folder), role="reference", run_id="mine", dtype="bfloat16")
    manifest, lines = again(folder, template_kwargs=NO_THOUGHT)
    assert (manifest.role, manifest.run_id, manifest.template_kwargs) == ("reference", "mine", NO_THOUGHT)
    assert manifest.dtype == "bfloat16"
    assert "dtype: bfloat16" in lines
    assert any("kept from" in line and "role reference, run_id mine" in line for line in lines)
    manifest, _ = again(folder, role="sft")
    assert (manifest.role, manifest.run_id, manifest.template_kwargs) == ("sft", "mine", NO_THOUGHT)


def test_a_decision_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Variables that close the thought and a prefix that holds one would give two thoughts."""
    folder = made(tmp_path / "a")
    adopt(str(folder), role="sft", response_prefix="<think>\n\n</think>\n")
    manifest, _ = again(folder, template_kwargs=NO_THOUGHT)
    assert (manifest.template_kwargs, manifest.response_prefix) == (NO_THOUGHT, None)
    manifest, _ = again(folder, response_prefix="")
    assert (manifest.template_kwargs, manifest.response_prefix) == ({}, "")


def test_choices_about_another_template_are_not_kept(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    adopt(str(folder), role="sft", response_prefix="", end_of_turn="<|stop|>")
    assert again(folder)[0].end_of_turn_id == 258, "a named end of turn is kept"
    write_tokenizer(folder, specials=SPECIALS, template=KINDS["plain ChatML"])
    manifest, lines = again(folder)
    assert (manifest.role, manifest.response_prefix, manifest.end_of_turn_id) == ("sft", None, 256)
    assert any("chat template changed since" in line for line in lines)


def test_a_date_and_a_renderer_are_kept(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", "the date")
    adopt(str(folder), role="sft", template_date="2024-07-26")
    assert again(folder)[0].template_date == "2024-07-26"
    adopt(str(folder), renderer="plain")
    manifest, _ = again(folder)
    assert (manifest.renderer, manifest.template_date) == ("plain", None)
    assert again(folder, ignore_manifest=True, role="sft")[0].renderer == "chat"


def test_without_a_manifest_the_role_must_be_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    assert "its role must be named: --role sft (the finished checkpoint)" in refusal(folder)
    adopt(str(folder), role="sft")
    assert "its role must be named" in refusal(folder, ignore_manifest=True).replace(" yet", "")


def test_the_record_of_a_training_is_kept_as_long_as_the_weights_are_the_same(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    adopt(str(folder), role="sft", run_id="mine")
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | RECORD))
    manifest, _ = again(folder, template_kwargs=NO_THOUGHT)
    assert {name: getattr(manifest, name) for name in RECORD} == RECORD
    made(folder, seed=1)
    before = path.read_bytes()
    assert "the weights are not those of" in refusal(folder, template_kwargs=NO_THOUGHT)
    assert path.read_bytes() == before
    manifest, _ = again(folder, role="sft", run_id="mine")
    assert (manifest.optimiser_step, manifest.data_sha256) == (None, None)


def test_a_side_folder_is_adopted_again_by_its_own_name(tmp_path: Path) -> None:
    source = made(tmp_path / "a")
    side = adopt(str(source), role="sft", run_id="mine", out=tmp_path / "side")
    manifest, _ = again(side, template_kwargs=NO_THOUGHT)
    assert (manifest.source, manifest.template_kwargs) == ("../a", NO_THOUGHT)
    verify_files(side, manifest)
    assert not (source / MANIFEST_NAME).exists()


def test_two_manifests_of_different_roles_are_asked_about(tmp_path: Path) -> None:
    source = made(tmp_path / "a")
    adopt(str(source), role="sft", run_id="mine")
    side = adopt(str(source), role="policy", out=tmp_path / "side")
    assert load_manifest(side).run_id == "mine"
    assert "have different manifests: name --role and --run-id" in refusal(source, out=side)
    assert again(source, out=side, role="policy", run_id="mine")[0].role == "policy"


def test_a_broken_manifest_is_replaced_if_nothing_of_it_is_needed(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    (folder / MANIFEST_NAME).write_text("{")
    assert "name --role and --run-id; nothing is kept of it" in refusal(folder)
    manifest, lines = again(folder, role="sft", run_id="mine")
    assert manifest.role == "sft"
    assert any("because it is broken" in line for line in lines)
