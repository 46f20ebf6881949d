"""TorchModel against plain transformers, one forward of one sequence each, on models with all kinds of heads."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.engine.base import IdArray, Trunk, Wants
from dense_reward.engine.logprobs import Candidates, ScoredRows, Side, score_rows
from dense_reward.engine.torch_engine import PostProcessing, TorchModel, load_model
from dense_reward.engine.weights import stored_dtype
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, load_manifest
from tiny_models import (
    CONFIGS,
    LONG_TOKENS,
    VOCABULARY,
    plain_logprobs,
    random_trunk,
    tiny_model,
    write_checkpoint,
)
from torch import Tensor
from transformers import PreTrainedModel

ALL = Wants(kl=True, entropy=True, top_k=4)
# Their output layer's input is divided before, or its output multiplied after, in a way that the configuration hides.
NATIVE = {"minicpm3", "hyperclovax"}
# float32 inside whatever the weights are: the softmax of eager attention, and the norms and rotations of some models.
FLOAT32_INSIDE = {"gemma2"}
QUANTITIES = ("sft_logprob_N", "reference_logprob_N", "kl_N", "entropy_N", "candidate_reward_M", "top_sft_logprob_NK")


def sequences_of(trunks: Sequence[Trunk]) -> tuple[list[IdArray], list[IdArray]]:
    """Every prompt with every branch, and the positions before its scored tokens."""
    pairs = [(trunk.prompt_P, branch) for trunk in trunks for branch in trunk.branches]
    return (
        [np.concatenate([prompt_P, branch.ids_T]) for prompt_P, branch in pairs],
        [(len(prompt_P) - 1 + np.flatnonzero(branch.scored_T)).astype(np.int32) for prompt_P, branch in pairs],
    )


def targets_of(trunks: Sequence[Trunk]) -> Tensor:
    ids = [branch.ids_T[branch.scored_T] for trunk in trunks for branch in trunk.branches]
    return torch.from_numpy(np.concatenate(ids)).long()


def candidates_of(trunks: Sequence[Trunk]) -> Tensor:
    blocks = [branch.candidates_SK for trunk in trunks for branch in trunk.branches]
    return torch.from_numpy(np.concatenate([block for block in blocks if block is not None])).long()


def scored(sft: TorchModel, reference: TorchModel, trunks: Sequence[Trunk], chunk_rows: int = 5) -> ScoredRows:
    sequences, positions = sequences_of(trunks)
    candidates_NK = candidates_of(trunks)
    counts_N = torch.full((len(candidates_NK),), candidates_NK.shape[1])
    with torch.inference_mode():
        return score_rows(
            Side(sft.rows(sequences, positions), sft.head),
            Side(reference.rows(sequences, positions), reference.head),
            targets_of(trunks),
            ALL,
            Candidates(candidates_NK.flatten(), counts_N),
            chunk_rows=chunk_rows,
        )


def expected(sft: PreTrainedModel, reference: PreTrainedModel, trunks: Sequence[Trunk]) -> dict[str, Tensor]:
    """The same from plain forwards, in float64 from the logits on."""
    p, q = (
        torch.cat(
            [
                plain_logprobs(model, trunk.prompt_P, branch.ids_T)[torch.from_numpy(branch.scored_T)]
                for trunk in trunks
                for branch in trunk.branches
            ]
        )
        for model in (sft, reference)
    )
    targets_N1, candidates_NK = targets_of(trunks)[:, None], candidates_of(trunks)
    return {
        "sft_logprob_N": p.gather(1, targets_N1)[:, 0],
        "reference_logprob_N": q.gather(1, targets_N1)[:, 0],
        "kl_N": (p.exp() * (p - q)).sum(1),
        "entropy_N": -(p.exp() * p).sum(1),
        "candidate_reward_M": (p - q).gather(1, candidates_NK).flatten(),
        "top_sft_logprob_NK": p.sort(dim=1, descending=True).values[:, :4],
    }


TRUNKS = (
    random_trunk(1, 9, (13, 0, 5, 8), k=2),
    random_trunk(2, 3, (1, 17), masked=True, k=2),
    random_trunk(3, 1, (6, 6), k=2),
)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_models_of_these_tests_spread_over_nats(name: str) -> None:
    """Without that every test below would pass with wrong numbers."""
    sft, reference = tiny_model(name, seed=1), tiny_model(name, seed=2)
    values = expected(sft, reference, TRUNKS)
    assert values["sft_logprob_N"].std() > 1
    assert values["kl_N"].mean() > 0.5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_quantity_is_that_of_plain_transformers(name: str, dtype: torch.dtype) -> None:
    sft, reference = tiny_model(name, seed=1, dtype=dtype), tiny_model(name, seed=2, dtype=dtype)
    values = expected(sft, reference, TRUNKS)
    rows = scored(TorchModel(sft), TorchModel(reference), TRUNKS)
    tolerance = 1e-9 if dtype is torch.float64 and name not in FLOAT32_INSIDE else 1e-4
    for quantity in QUANTITIES:
        found = getattr(rows, quantity)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), values[quantity], atol=tolerance, rtol=0, msg=quantity)


@pytest.mark.parametrize("name", sorted(FLOAT32_INSIDE))
def test_capped_heads_are_exact_where_attention_computes_the_very_same(name: str) -> None:
    sft, reference = tiny_model(name, seed=1), tiny_model(name, seed=2)
    models = TorchModel(sft), TorchModel(reference)
    for seed in range(4):
        alone = (random_trunk(seed, 5, (9,), k=2),)
        values, rows = expected(sft, reference, alone), scored(*models, alone)
        for quantity in QUANTITIES:
            torch.testing.assert_close(getattr(rows, quantity), values[quantity], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_is_taken_apart_only_where_that_is_exact(name: str) -> None:
    model = tiny_model(name)
    ours = TorchModel(model)
    rows = ours.rows([np.arange(5, dtype=np.int32)], [np.arange(5, dtype=np.int32)])
    assert rows.shape == (5, VOCABULARY if name in NATIVE else 32)
    with torch.inference_mode():
        native = model(input_ids=torch.arange(5)[None], use_cache=False).logits[0]
        assert torch.equal(ours.head(rows), native)


def test_a_cap_that_the_configuration_hides_is_noticed_however_far_it_is_above_the_logits() -> None:
    one_id = [np.arange(1, dtype=np.int32)]
    assert TorchModel(tiny_model("llama")).rows(one_id, one_id).shape[1] == 32
    hidden = tiny_model("llama")
    hidden.register_forward_hook(_cap_logits)
    assert TorchModel(hidden).rows(one_id, one_id).shape[1] == VOCABULARY


def _cap_logits(_: torch.nn.Module, __: object, output: dict[str, Tensor]) -> dict[str, Tensor]:
    output["logits"] = 4_000 * torch.tanh(output["logits"] / 4_000)
    return output


def test_post_processing_divides_multiplies_and_caps() -> None:
    logits = torch.tensor([3.0, -600.0])
    assert torch.equal(PostProcessing()(logits), logits)
    assert torch.equal(PostProcessing(factor=2.0, divisor=3.0)(logits), torch.tensor([2.0, -400.0]))
    torch.testing.assert_close(PostProcessing(cap=5.0)(logits), torch.tensor([5 * np.tanh(0.6), -5.0]).float())


@pytest.mark.parametrize("name", CONFIGS)
def test_identical_models_give_a_reward_and_a_kl_of_exactly_0(name: str) -> None:
    first, second = (TorchModel(tiny_model(name, seed=5, dtype=torch.float32)) for _ in range(2))
    rows = scored(first, second, TRUNKS)
    assert torch.equal(rows.sft_logprob_N, rows.reference_logprob_N)
    assert rows.kl_N is not None
    assert not rows.kl_N.any()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "longrope"])
def test_padding_reaches_no_other_sequence_however_long_the_longest_is(name: str) -> None:
    """Far beyond any window, so that padded rows see nothing but padding."""
    model = TorchModel(tiny_model(name, dtype=torch.float32))
    short, long = random_trunk(1, 4, (6, 3), k=1), random_trunk(2, 4, (90,), k=1)
    alone, together = scored(model, model, [short]), scored(model, model, [short, long])
    torch.testing.assert_close(alone.sft_logprob_N, together.sft_logprob_N[:9], atol=5e-5, rtol=0)


def test_a_model_says_beyond_which_length_it_turns_positions_otherwise() -> None:
    assert TorchModel(tiny_model("longrope")).long_tokens == LONG_TOKENS
    assert TorchModel(tiny_model("llama")).long_tokens is None


def test_probes_are_the_log_probs_of_a_plain_forward() -> None:
    model = tiny_model("mistral", dtype=torch.float32)
    trunk = random_trunk(0, 6, (20,))
    prompt, response = trunk.prompt_P, trunk.branches[0].ids_T
    found = TorchModel(model).logprobs(prompt.tolist(), response.tolist())
    plain = plain_logprobs(model, prompt, response).gather(1, torch.from_numpy(response).long()[:, None])[:, 0]
    np.testing.assert_allclose(found, plain.numpy(), atol=1e-5)
    assert TorchModel(model).logprobs(prompt.tolist(), []) == []


def test_a_model_is_frozen_and_keeps_no_hook() -> None:
    model = tiny_model("llama").train()
    ours = TorchModel(model)
    ours.rows([np.arange(4, dtype=np.int32)], [np.arange(2, dtype=np.int32)])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "gemma2"
    write_checkpoint(folder, architecture="gemma2", dtype=torch.bfloat16)
    return folder


def manifest_of(checkpoint: Path, **changes: object) -> Manifest:
    return load_manifest(checkpoint).model_copy(update=changes)


def test_capped_attention_is_loaded_with_the_implementation_that_caps(checkpoint: Path) -> None:
    model = load_model(checkpoint, manifest_of(checkpoint), dtype=None, device="cpu")
    assert model._model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("asked", "served"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_weights_are_loaded_in_their_own_dtype_unless_another_is_asked_for(
    checkpoint: Path, asked: str | None, served: torch.dtype
) -> None:
    assert stored_dtype(checkpoint) == "bfloat16"
    model = load_model(checkpoint, manifest_of(checkpoint), dtype=asked, device="cpu")
    assert {parameter.dtype for parameter in model._model.parameters()} == {served}


def test_a_mixture_of_experts_can_be_served_in_float64(tmp_path: Path) -> None:
    manifest = write_checkpoint(tmp_path / "moe", architecture="mixtral")
    model = load_model(tmp_path / "moe", manifest, dtype="float64", device="cpu")
    probe = manifest.probe[0]
    served = model.logprobs(probe.prompt_ids, probe.responses[0].ids)
    np.testing.assert_allclose(served, probe.responses[0].logprobs, atol=1e-3)


def test_a_dtype_that_cannot_be_served_is_refused_with_those_that_can(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"float8_e4m3fn.*bfloat16"):
        load_model(checkpoint, manifest_of(checkpoint, dtype="float8_e4m3fn"), dtype=None, device="cpu")


def test_a_model_without_the_rows_that_its_manifest_promises_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{VOCABULARY} output rows, its manifest says 1000"):
        load_model(checkpoint, manifest_of(checkpoint, vocabulary=1000), dtype=None, device="cpu")


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_model(tmp_path, manifest_of(checkpoint), dtype=None, device="cpu")
