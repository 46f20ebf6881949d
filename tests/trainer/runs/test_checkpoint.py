"""Checkpoints appear complete or not at all, pass their probe, and survive kills at any point."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.checkpoints.probe import ProbeIds, probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, files_folder, load_manifest, verify_files
from dense_reward.text.encode import Encoder
from dense_reward_trainer.configs.sft import ScratchOptions
from dense_reward_trainer.runs.checkpoint import (
    is_complete,
    newest_training_state,
    recover,
    training_step,
    write_checkpoint,
    write_named_checkpoint,
    writes_same_texts,
)
from dense_reward_trainer.sft.from_scratch import random_model, train_tokenizer
from transformers import PreTrainedModel

TOKENIZER = train_tokenizer(["Add 12 and 34.", "46"], 270)
OPTIONS = ScratchOptions(vocabulary=270, hidden_size=16, layers=1, heads=2, intermediate_size=16)
FACTS = ManifestFacts(role="sft", run_id="run", renderer="plain", optimiser_step=4, seed=0)


def model(seed: int = 0) -> PreTrainedModel:
    """A model with enlarged weights, so that log-probs are far from uniform."""
    made = random_model(OPTIONS, TOKENIZER, seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    return made


def written(folder: Path, facts: ManifestFacts = FACTS, seed: int = 0) -> Manifest:
    return write_checkpoint(folder, model(seed), TOKENIZER, facts, probe_of_texts)


def killed(_: Encoder, __: int) -> Sequence[ProbeIds]:
    raise KeyboardInterrupt


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_holds_weights_tokenizer_and_a_manifest_that_fits_them(tmp_path: Path) -> None:
    manifest = written(tmp_path / "sft")
    assert load_manifest(tmp_path / "sft") == manifest
    verify_files(tmp_path / "sft", manifest)
    assert files_folder(tmp_path / "sft", manifest) == tmp_path / "sft"
    assert manifest.vocabulary == len(TOKENIZER)
    assert (manifest.dtype, manifest.optimiser_step, manifest.seed) == ("float32", 4, 0)
    assert entries(tmp_path) == ["sft"]


def test_the_probe_is_what_the_model_itself_computes(tmp_path: Path) -> None:
    manifest = written(tmp_path / "sft")
    assert len(manifest.probe) >= 2
    for sequence in manifest.probe:
        assert len(sequence.responses) >= 2
        for response in sequence.responses:
            ids = torch.tensor([[*sequence.prompt_ids, *response.ids]])
            logits_TV = model()(input_ids=ids).logits[0, len(sequence.prompt_ids) - 1 : -1]
            expected = torch.log_softmax(logits_TV, -1)[range(len(response.ids)), list(response.ids)]
            np.testing.assert_allclose(response.logprobs, expected.detach(), atol=1e-5)


def test_two_checkpoints_of_one_run_are_served_as_a_pair(tmp_path: Path) -> None:
    written(tmp_path / "sft")
    written(tmp_path / "reference", replace(FACTS, role="reference", optimiser_step=2), seed=1)
    serving = ServingOptions(max_batch_tokens=512)
    engine, tokenizer, _ = load_pair(tmp_path / "sft", tmp_path / "reference", serving, LoadContext(lambda _: None))
    assert engine.info.related
    assert tokenizer.vocab_size == len(TOKENIZER)


def test_files_can_be_read_by_whoever_can_read_the_folder(tmp_path: Path) -> None:
    written(tmp_path / "sft")
    mode = (tmp_path / "sft").stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "sft").iterdir()} == {mode}


def test_a_kill_before_the_manifest_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "sft", model(), TOKENIZER, FACTS, killed)
    assert not is_complete(tmp_path / "sft")
    written(tmp_path / "sft")
    assert entries(tmp_path) == ["sft"]


def test_a_kill_while_replacing_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    old = written(tmp_path / "sft")
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "sft", model(1), TOKENIZER, FACTS, killed)
    assert load_manifest(tmp_path / "sft") == old
    verify_files(tmp_path / "sft", old)


def test_a_complete_checkpoint_is_replaced_as_a_whole(tmp_path: Path) -> None:
    old = written(tmp_path / "sft")
    (tmp_path / "sft" / "left_over.json").write_text("{}")
    new = written(tmp_path / "sft", seed=1)
    assert new.weights_sha256 != old.weights_sha256
    assert load_manifest(tmp_path / "sft") == new
    assert not (tmp_path / "sft" / "left_over.json").exists()
    assert entries(tmp_path) == ["sft"]


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    old = written(tmp_path / "sft")
    (tmp_path / "sft").rename(tmp_path / ".sft.replaced")
    recover(tmp_path / "sft")
    assert load_manifest(tmp_path / "sft") == old
    assert entries(tmp_path) == ["sft"]


def test_what_a_kill_after_the_renames_leaves_is_removed(tmp_path: Path) -> None:
    written(tmp_path / ".sft.replaced")
    new = written(tmp_path / "sft", seed=1)
    recover(tmp_path / "sft")
    assert load_manifest(tmp_path / "sft") == new
    assert entries(tmp_path) == ["sft"]


def test_weights_that_give_no_numbers_are_refused(tmp_path: Path) -> None:
    broken = model()
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="1 of its weights hold NaN or infinity"):
        write_checkpoint(tmp_path / "sft", broken, TOKENIZER, FACTS, probe_of_texts)
    assert not is_complete(tmp_path / "sft")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    other = train_tokenizer(["Add 17 and 25 and France and Paris, the capital of France"] * 9, 300)
    with pytest.raises(CheckpointError, match=f"has only {len(TOKENIZER)} output rows"):
        write_checkpoint(tmp_path / "sft", model(), other, FACTS, probe_of_texts)


def training_state(folder: Path, step: int, content: str) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(content)
    return path


def test_the_newest_complete_training_state_is_taken_and_incomplete_ones_are_removed(tmp_path: Path) -> None:
    training_state(tmp_path, 9, json.dumps({"global_step": 9}))
    newest = training_state(tmp_path, 10, json.dumps({"global_step": 10}))
    training_state(tmp_path, 20, '{"global_st')
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "README.md").write_text("")
    reported: list[str] = []
    assert newest_training_state(tmp_path, reported.append) == newest
    assert training_step(newest) == 10
    assert entries(tmp_path) == ["README.md", "checkpoint-10", "checkpoint-9"]
    assert len(reported) == 2
    assert all("incomplete" in line for line in reported)


def test_without_training_states_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert newest_training_state(tmp_path / "no such folder", lambda _: None) is None


def test_a_named_checkpoint_is_only_a_manifest_that_names_other_files(tmp_path: Path) -> None:
    written(tmp_path / "model")
    facts = replace(FACTS, role="reference", source=tmp_path / "model")
    for _ in range(2):
        manifest = write_named_checkpoint(tmp_path / "run" / "base", facts, probe_of_texts)
    assert entries(tmp_path / "run") == ["base"]
    assert entries(tmp_path / "run" / "base") == ["manifest.json"]
    assert manifest.source == "../../model"
    assert files_folder(tmp_path / "run" / "base", manifest) == tmp_path / "model"
    verify_files(tmp_path / "run" / "base", manifest)


@pytest.mark.parametrize("other", ["nothing", "tokenizer", "template", "output rows"])
def test_files_can_be_named_if_they_mean_the_same_texts(tmp_path: Path, other: str) -> None:
    facts = replace(FACTS, renderer="chat", source=tmp_path, end_of_turn_id=TOKENIZER.bos_token_id)
    model().save_pretrained(tmp_path)
    named = train_tokenizer(["another text"], 270) if other == "tokenizer" else deepcopy(TOKENIZER)
    if other == "template":
        named.chat_template = "!" + str(named.chat_template)
    named.save_pretrained(tmp_path)
    trained = model()
    if other == "output rows":
        trained.resize_token_embeddings(len(TOKENIZER) + 1)
    assert writes_same_texts(trained, TOKENIZER, facts) == (other == "nothing")
    adapter = replace(facts, adapter_base=tmp_path)
    assert writes_same_texts(trained, TOKENIZER, adapter) == (other in {"nothing", "output rows"})
