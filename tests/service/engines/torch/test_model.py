"""TorchModel against plain transformers, one forward of one sequence each, packed and padded, on all architectures."""

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.batching.packing import pack
from dense_reward.engines.torch.attention import PackedAttentionError
from dense_reward.engines.torch.model import TorchModel, device_row, load_model
from dense_reward.engines.torch.weights import stored_dtype
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, load_manifest
from expected_rows import TRUNKS, batches_of, expected, scored
from tiny_configs import CONFIGS, LONG_TOKENS, PACKED, VOCABULARY
from tiny_models import plain_logprobs, random_trunk, tiny_model, write_checkpoint

pytestmark = pytest.mark.slow

# These compute in float32 inside, whatever the dtype of the weights: the softmax of eager attention, ALiBi's biases.
FLOAT32_INSIDE = {"gemma2", "bloom", "mpt"}
PATHS = [(name, "packed") for name in PACKED] + [(name, "padded") for name in CONFIGS]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_models_of_these_tests_spread_over_nats(name: str) -> None:
    """Else every test below would pass with wrong numbers."""
    sft, reference = tiny_model(name, seed=1), tiny_model(name, seed=2)
    (batch,) = batches_of(TRUNKS[:2], TorchModel(sft), packed=False, max_tokens=1 << 20)[-1:]
    values = expected(sft, reference, batch)
    assert values["sft"].std() > 1
    assert values["kl"].mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "path"), PATHS)
def test_every_quantity_is_that_of_plain_transformers(name: str, path: str, dtype: torch.dtype) -> None:
    plain = [tiny_model(name, seed=seed, dtype=dtype) for seed in (1, 2)]
    ours = [TorchModel(tiny_model(name, seed=seed, dtype=dtype)) for seed in (1, 2)]
    tolerance = 1e-9 if dtype is torch.float64 and name not in FLOAT32_INSIDE else 5e-5
    for batch in batches_of(TRUNKS, ours[0], packed=path == "packed"):
        found, values = scored(ours[0], ours[1], batch), expected(plain[0], plain[1], batch)
        assert found.keys() == values.keys()
        for quantity, value in values.items():
            assert found[quantity].dtype == dtype
            torch.testing.assert_close(found[quantity].double(), value, atol=tolerance, rtol=0, msg=quantity)


def test_capped_heads_are_exact_where_attention_computes_the_very_same() -> None:
    """One padded sequence uses the same attention as the plain forward, so only the head can differ."""
    sft, reference = tiny_model("gemma2", seed=1), tiny_model("gemma2", seed=2)
    models = TorchModel(tiny_model("gemma2", seed=1)), TorchModel(tiny_model("gemma2", seed=2))
    for seed in range(4):
        (batch,) = batches_of([random_trunk(seed, 5, (9,), k=2)], models[0], packed=False)
        found, values = scored(*models, batch), expected(sft, reference, batch)
        for quantity, value in values.items():
            torch.testing.assert_close(found[quantity], value, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_identical_models_give_a_reward_and_a_kl_of_exactly_0(name: str, path: str) -> None:
    first, second = (TorchModel(tiny_model(name, seed=5, dtype=torch.float32)) for _ in range(2))
    for batch in batches_of(TRUNKS, first, packed=path == "packed"):
        found = scored(first, second, batch)
        assert torch.equal(found["sft"], found["reference"])
        assert not found["kl"].any()
        assert not found["candidates"].any()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "longrope"])
def test_padding_reaches_no_other_sequence_however_long_the_longest_is(name: str) -> None:
    """90 tokens are far more than any window, so the last padded rows have only padding in their windows."""
    model = TorchModel(tiny_model(name, dtype=torch.float32))
    short, long = random_trunk(1, 4, (6, 3), k=1), random_trunk(2, 4, (90,), k=1)
    (alone,), (together,) = (
        batches_of(trunks, model, packed=False, max_tokens=1000) for trunks in ([short], [short, long])
    )
    expected_S = scored(model, model, alone)["sft"]
    torch.testing.assert_close(expected_S, scored(model, model, together)["sft"][:9], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2"])
def test_a_model_computes_either_way_in_any_order_and_its_probes_always_plainly(name: str) -> None:
    """Each path sets its own attention; the other path's would be wrong or raise."""
    model = TorchModel(tiny_model(name, dtype=torch.float32))
    trunk = random_trunk(0, 6, (20, 9), k=1)
    prompt, response = trunk.prompt_P.tolist(), trunk.branches[0].ids_T.tolist()
    probe = model.logprobs(prompt, response)
    paths = [False, True, False, True] if name in PACKED else [False, False]
    found = [scored(model, model, batch)["sft"] for path in paths for batch in batches_of([trunk], model, packed=path)]
    assert sum(map(len, found)) == len(paths) * 29
    assert model.logprobs(prompt, response) == probe


def test_a_model_that_drops_the_plan_says_so_where_it_is_computed_packed_all_the_same() -> None:
    model = TorchModel(tiny_model("nemotron"))
    (packed,) = pack(TRUNKS[:1], max_tokens=1000)
    with pytest.raises(PackedAttentionError, match="does not pass its forward's arguments"):
        model.packed_rows(device_row(packed, model.device))


def test_a_model_says_beyond_which_length_it_turns_positions_otherwise() -> None:
    assert TorchModel(tiny_model("longrope")).rope_length_limit == LONG_TOKENS
    assert TorchModel(tiny_model("llama")).rope_length_limit is None


def test_probes_are_the_log_probs_of_a_plain_forward() -> None:
    model = tiny_model("mistral", dtype=torch.float32)
    trunk = random_trunk(0, 6, (20,))
    prompt, response = trunk.prompt_P, trunk.branches[0].ids_T
    found = TorchModel(model).logprobs(prompt.tolist(), response.tolist())
    plain = plain_logprobs(model, prompt, response).gather(1, torch.from_numpy(response).long()[:, None])[:, 0]
    np.testing.assert_allclose(found, plain.numpy(), atol=1e-5)
    assert TorchModel(model).logprobs(prompt.tolist(), []) == []


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_a_model_is_frozen_and_keeps_no_hook(path: str) -> None:
    model = tiny_model("llama").train()
    ours = TorchModel(model)
    for batch in batches_of(TRUNKS, ours, packed=path == "packed"):
        batch.rows(ours)
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


@pytest.mark.parametrize(("requested", "served"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_weights_are_loaded_in_their_own_dtype_unless_another_is_asked_for(
    checkpoint: Path, requested: str | None, served: torch.dtype
) -> None:
    assert stored_dtype(checkpoint) == "bfloat16"
    model = load_model(checkpoint, manifest_of(checkpoint), dtype=requested, device="cpu")
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
    with pytest.raises(CheckpointError, match=rf"{VOCABULARY} output rows, but its manifest states 1000"):
        load_model(checkpoint, manifest_of(checkpoint, vocabulary=1000), dtype=None, device="cpu")


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    with pytest.raises(CheckpointError, match="does not support its architecture 'no-such-architecture'"):
        load_model(tmp_path, manifest_of(checkpoint), dtype=None, device="cpu")


def test_a_model_whose_norms_were_changed_is_freed_with_its_last_user() -> None:
    model = TorchModel(tiny_model("llama", dtype=torch.bfloat16))
    model.use_norms(torch.float32)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
