"""Policies made of two checkpoints: weights extrapolated, logits tilted, and pairs that do not belong together."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_reward.errors import CheckpointError
from dense_reward_trainer.configs.evaluate import ExtrapolateOptions, TiltOptions
from dense_reward_trainer.policies.load import extrapolated, tilted
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from tiny_policy import tiny_checkpoint, tiny_llama

FOLDER, OTHER = Path("runs/sft"), Path("runs/base")


def with_manifest(checkpoint: PolicyCheckpoint, **changes: object) -> PolicyCheckpoint:
    return replace(checkpoint, manifest=checkpoint.manifest.model_copy(update=changes))


def test_weights_move_on_along_the_line_from_the_base() -> None:
    sft, base = tiny_checkpoint(), tiny_checkpoint(seed=1)
    before = {name: p.detach().clone() for name, p in sft.policy.model.named_parameters()}
    found = extrapolated(sft, base, ExtrapolateOptions(base=OTHER, strength=0.5), FOLDER)
    base_weights = dict(base.policy.model.named_parameters())
    for name, weight in found.policy.model.named_parameters():
        torch.testing.assert_close(weight, 1.5 * before[name] - 0.5 * base_weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["rope_theta", "num_attention_heads", "hidden_act"])
def test_another_architecture_is_refused_even_if_all_shapes_agree(key: str) -> None:
    sft, base = tiny_checkpoint(), tiny_checkpoint(seed=1)
    values = {"rope_theta": 5e5, "num_attention_heads": 4, "hidden_act": "gelu"}
    setattr(base.policy.model.config, key, values[key])
    with pytest.raises(CheckpointError, match=f"runs/sft cannot be extrapolated from runs/base.*{key}.*started"):
        extrapolated(sft, base, ExtrapolateOptions(base=OTHER), FOLDER)


def test_what_does_not_change_the_computation_may_differ() -> None:
    sft, base = tiny_checkpoint(), tiny_checkpoint(seed=1)
    base.policy.model.config.eos_token_id = 7
    base.policy.model.config.use_cache = False
    base.policy.model.config.attention_dropout = 0.1
    extrapolated(sft, base, ExtrapolateOptions(base=OTHER), FOLDER)


def test_weights_of_other_names_or_tokenizers_are_refused() -> None:
    sft, base = tiny_checkpoint(), with_manifest(tiny_checkpoint(seed=1), tokenizer_sha256="another")
    with pytest.raises(CheckpointError, match="they have different tokenizers"):
        extrapolated(sft, base, ExtrapolateOptions(base=OTHER), FOLDER)
    wider = tiny_checkpoint(seed=1)
    model = tiny_llama(vocab_size=300)
    model.config.vocab_size = wider.policy.model.config.vocab_size
    wider = replace(wider, policy=replace(wider.policy, model=model))
    with pytest.raises(CheckpointError, match="different names or shapes"):
        extrapolated(sft, wider, ExtrapolateOptions(base=OTHER), FOLDER)


def test_a_checkpoint_is_not_extrapolated_from_itself() -> None:
    with pytest.raises(CheckpointError, match=r"extrapolated from runs/base: their weights are equal.*started from"):
        extrapolated(tiny_checkpoint(), tiny_checkpoint(), ExtrapolateOptions(base=OTHER), FOLDER)


def test_a_tilted_checkpoint_keeps_its_own_model_and_encoder() -> None:
    sft, reference = tiny_checkpoint(), with_manifest(tiny_checkpoint(seed=1), files={"model.safetensors": "another"})
    found = tilted(sft, reference, TiltOptions(reference=OTHER, strength=2.0), FOLDER)
    assert found.policy.model is sft.policy.model
    assert found.policy.tilt is not None
    assert (found.policy.tilt.reference, found.policy.tilt.strength) == (reference.policy.model, 2.0)
    assert sft.policy.tilt is None


def test_models_with_other_tokenizers_are_not_tilted() -> None:
    reference = with_manifest(tiny_checkpoint(seed=1), tokenizer_sha256="another")
    with pytest.raises(CheckpointError, match=r"runs/sft \(sft\) cannot be tilted away from runs/base.*tokenizers"):
        tilted(tiny_checkpoint(), reference, TiltOptions(reference=OTHER), FOLDER)
