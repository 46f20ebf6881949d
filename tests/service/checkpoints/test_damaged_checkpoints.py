"""Damaged checkpoints are refused in words, at adoption, at load and at the start of SFT; odd but healthy ones load."""

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged_checkpoints import (
    DAMAGED,
    HEALTHY,
    LFS_POINTER,
    Change,
    content,
    cut,
    renamed,
    tiny_llama,
    weights,
    without,
    write_model,
)
from dense_reward import cli
from dense_reward.checkpoints import write_manifest as write_manifest_module
from dense_reward.checkpoints.adopt import adopt
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.engines.torch.weights import load_weights
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME, hash_files
from dense_reward.records import Wants
from dense_reward_trainer import cli as trainer_cli
from dense_reward_trainer.rl.policy import load_policy
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import CHAT, random_trunk, tiny_model, write_tokenizer
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
# peft 0.21 asks transformers 5.23 for an attribute by its old name
OLD_NAME_IN_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adopted pair."""
    folder = tmp_path_factory.mktemp("healthy")
    for seed, role in ((1, "sft"), (2, "reference")):
        adopt(str(write_model(folder / role, tiny_llama(seed))), role=role, run_id="mine")  # type: ignore[arg-type]
    return folder


def damaged(healthy: Path, folder: Path, name: str) -> Path:
    """A copy of the healthy sft checkpoint without its manifest, then damaged."""
    shutil.copytree(healthy / "sft", folder)
    (folder / MANIFEST_NAME).unlink()
    DAMAGED[name].change(folder)
    return folder


def in_words(capsys: pytest.CaptureFixture[str], start: str) -> str:
    """What a command wrote about its failure: one line. A traceback would have reached the test."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(start)]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", DAMAGED)
def test_adoption_refuses_a_damaged_checkpoint(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = damaged(healthy, tmp_path / "damaged", name)
    assert cli.main(["adopt", str(folder), "--role", "sft", "--run-id", "mine"]) == 2
    assert_says(in_words(capsys, "dense-reward: "), name)
    assert not (folder / MANIFEST_NAME).exists()


@pytest.mark.parametrize("name", DAMAGED)
def test_loading_refuses_a_checkpoint_whose_manifest_was_made_on_the_damage(
    healthy: Path, tmp_path: Path, name: str
) -> None:
    """The manifest of an earlier version: right hashes, and a probe that cannot tell."""
    folder = damaged(healthy, tmp_path / "damaged", name)
    manifest = json.loads((healthy / "sft" / MANIFEST_NAME).read_text()) | {"files": hash_files(folder)}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as caught:
        load_pair(folder, healthy / "reference", ServingOptions(max_batch_tokens=1000), LoadContext(lambda _: None))
    assert_says(str(caught.value), name)


@pytest.mark.parametrize("name", DAMAGED)
def test_sft_does_not_start_from_a_damaged_checkpoint(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = damaged(healthy, tmp_path / "damaged", name)
    changes = [f"base_model={folder}", f"output_dir={tmp_path / 'run'}"]
    assert trainer_cli.main(["sft", "sft_full_tiny", *changes]) == 2
    assert_says(in_words(capsys, "error: "), name)
    assert not (tmp_path / "run" / "checkpoints").exists()


def assert_says(message: str, name: str) -> None:
    assert re.search(DAMAGED[name].says, message), message
    assert "\n" not in message


@pytest.mark.parametrize("name", HEALTHY)
def test_an_odd_but_healthy_checkpoint_loads_with_its_own_weights(tmp_path: Path, name: str) -> None:
    make, change = HEALTHY[name]
    model = make()
    folder = write_model(tmp_path / "healthy", model)
    change(folder)
    adopt(str(folder), role="sft", run_id="mine")
    loaded = load_weights(folder, folder, torch.float32)
    ids_1L = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids_1L).logits, model(ids_1L).logits)


def adapter_on(
    base: Path, folder: Path, *, seed: int = 0, rows: int | None = None, options: Mapping[str, object] = {}
) -> Path:
    """An adapter of every linear layer with weights that matter; `rows`: after resizing the vocabulary to these."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    adapter = get_peft_model(model, LoraConfig(**({"r": 2, "target_modules": "all-linear"} | dict(options))))
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapter.save_pretrained(folder, save_embedding_layers=rows is not None)
    write_tokenizer(folder, template=CHAT)
    return folder


def named_base(base: str) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))

    return apply


ADAPTER_WEIGHTS = "adapter_model.safetensors"
DAMAGED_ADAPTERS = {
    "compiled": (
        renamed(lambda name: name.replace("model.model.", "model._orig_mod.model."), ADAPTER_WEIGHTS),
        "torch.compile put '_orig_mod.' into them: strip it",
    ),
    "data parallel": (renamed("module.{}".format, ADAPTER_WEIGHTS), "put 'module.' into them: strip it"),
    "half of its weights": (
        renamed(lambda name: None if "lora_B" in name else name, ADAPTER_WEIGHTS),
        "14 weights of the model missing from its files .* was not saved completely",
    ),
    "a layer that the base lacks": (
        weights(
            lambda old: old | {n.replace("s.1.", "s.5."): t for n, t in old.items() if "s.1." in n}, ADAPTER_WEIGHTS
        ),
        "14 weights in its files that the model lacks .* trained on another base model",
    ),
    "other sizes": (
        weights(lambda old: {n: t[:, :8] if "lora_A" in n else t for n, t in old.items()}, ADAPTER_WEIGHTS),
        "trained on a model of other sizes .*: name its own base",
    ),
    "base elsewhere": (
        named_base("/home/trainer/llama"),
        "names the base model /home/trainer/llama, which is not here",
    ),
    "no base named": (named_base(""), "has no base_model_name_or_path: add"),
    "pointer": (content(ADAPTER_WEIGHTS, LFS_POINTER), "is a git-lfs pointer"),
    "cut": (cut(ADAPTER_WEIGHTS, -100), "it is cut off or overwritten"),
    "pickled": (
        lambda folder: (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin"),
        "only safetensors are loaded",
    ),
    "configuration that is no JSON": (content("adapter_config.json", "{"), "adapter_config.json is not JSON"),
}


@OLD_NAME_IN_PEFT
@pytest.mark.parametrize("name", DAMAGED_ADAPTERS)
def test_adoption_refuses_a_damaged_adapter(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = adapter_on(healthy / "reference", tmp_path / "adapter")
    change, says = DAMAGED_ADAPTERS[name]
    change(folder)
    assert cli.main(["adopt", str(folder), "--role", "sft", "--run-id", "mine"]) == 2
    message = in_words(capsys, "dense-reward: ")
    assert re.search(says, message), message
    assert not (folder / MANIFEST_NAME).exists()


@OLD_NAME_IN_PEFT
@pytest.mark.parametrize("name", [*DAMAGED_ADAPTERS][:5])
def test_loading_refuses_an_adapter_whose_manifest_was_made_on_the_damage(
    healthy: Path, tmp_path: Path, name: str
) -> None:
    folder = adapter_on(healthy / "reference", tmp_path / "adapter")
    adopt(str(folder), role="sft", run_id="mine")
    change, says = DAMAGED_ADAPTERS[name]
    change(folder)
    manifest = json.loads((folder / MANIFEST_NAME).read_text()) | {"files": hash_files(folder)}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=says):
        load_pair(folder, healthy / "reference", ServingOptions(max_batch_tokens=1000), LoadContext(lambda _: None))
    with pytest.raises(CheckpointError, match=says):
        load_policy(folder, precision="float32", device="cpu")


@OLD_NAME_IN_PEFT
@pytest.mark.parametrize("target", ["all-linear", ["q_proj"]])
def test_an_adapter_with_added_tokens_is_refused_with_the_cure(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str | list[str]
) -> None:
    folder = adapter_on(healthy / "reference", tmp_path / "adapter", rows=261, options={"target_modules": target})
    assert cli.main(["adopt", str(folder), "--role", "sft"]) == 2
    message = in_words(capsys, "dense-reward: ")
    assert "the adapter was trained on a resized vocabulary (" in message
    assert "resize the base model to it" in message


@OLD_NAME_IN_PEFT
def test_a_damaged_base_is_named_and_not_the_adapter(healthy: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(healthy / "reference", base)
    folder = adapter_on(base, tmp_path / "adapter")
    without("model.norm")(base)
    with pytest.raises(CheckpointError, match=rf"^{base}: 1 weight of the model missing from its files"):
        adopt(str(folder), role="sft")


@OLD_NAME_IN_PEFT
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    ],
    ids=["LoRA", "DoRA", "rsLoRA", "modules to save", "embeddings", "token indices"],
)
@pytest.mark.parametrize("named", ["absolute", "relative"])
def test_a_healthy_adapter_loads_and_its_rewards_are_those_of_peft(
    healthy: Path, tmp_path: Path, options: dict[str, object], named: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(healthy / "reference", base)
    folder = adapter_on(base, tmp_path / "adapter", seed=3, options=options)
    if named == "relative":
        named_base("../base")(folder)
    adopt(str(folder), role="sft", run_id="mine")
    moved = tmp_path / "moved"
    moved.mkdir()
    for part in (base, folder):
        part.rename(moved / part.name)
    pair = moved / "adapter", moved / "base"
    engine, _, _ = load_pair(*pair, ServingOptions(max_batch_tokens=1000), LoadContext(lambda _: None))
    model = AutoModelForCausalLM.from_pretrained(moved / "base")
    unmerged = PeftModel.from_pretrained(model, moved / "adapter").eval()
    trunk = random_trunk(1, 6, (9,))
    (scores,) = engine.score([trunk], Wants())[0]
    ids_1L = torch.from_numpy(np.concatenate([trunk.prompt_P, trunk.branches[0].ids_T])).long()[None]
    with torch.inference_mode():
        logprobs_LV = torch.log_softmax(unmerged(input_ids=ids_1L).logits[0].double(), -1)
    expected = logprobs_LV[5:-1].gather(1, ids_1L[0, 6:, None])[:, 0].numpy()
    np.testing.assert_allclose(scores.sft_logprob_S, expected, atol=2e-4)


def test_a_broken_template_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "a", tiny_llama())
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}")
    assert cli.main(["adopt", str(folder), "--role", "sft"]) == 2
    assert "the chat template refuses" in (line := in_words(capsys, "dense-reward: "))
    assert "correct the template (chat_template.jinja), or adopt with --renderer plain" in line


def test_a_full_disk_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "a", tiny_llama())

    def full(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(write_manifest_module, "write_whole", full)
    assert cli.main(["adopt", str(folder), "--role", "sft"]) == 2
    assert "manifest.json cannot be written (No space left on device): make space" in in_words(capsys, "dense-reward: ")


def test_an_expert_with_a_missing_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "a", tiny_model("mixtral", dtype=torch.float32))
    without("experts.1.w1")(folder)
    assert cli.main(["adopt", str(folder), "--role", "sft"]) == 2
    assert "as those of a layer's experts, are incomplete or differ in shape" in in_words(capsys, "dense-reward: ")
