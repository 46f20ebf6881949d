"""Output layers are separated from their models only if that gives the models' own logits; else the logits are used."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from dense_reward.engines.torch.heads import CapturedHead, LinearHead, OwnLogits, PostProcessing, linear_head
from dense_reward.engines.torch.logprobs import ModelRows, WantedIds, score_rows
from dense_reward.engines.torch.model import TorchModel
from dense_reward.errors import CheckpointError
from expected_rows import TRUNKS, batches_of, scored
from tiny_configs import CONFIGS, PACKED, VOCABULARY
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

POST_PROCESSED = {
    "gemma2": PostProcessing(cap=4.0),
    "cohere": PostProcessing(factor=2.0),
    "granite": PostProcessing(divisor=0.5),
    "hyperclovax": PostProcessing(factor=3.0),
}


def hidden_change(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A model that changes its logits after its output layer, which its configuration does not declare."""

    def hook(_: nn.Module, __: object, output: dict[str, Tensor]) -> dict[str, Tensor]:
        output["logits"] = change(output["logits"])
        return output

    model.register_forward_hook(hook)
    return model


def captured(model: PreTrainedModel) -> CapturedHead:
    return CapturedHead(model.get_output_embeddings())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_output_layer_taken_apart_gives_the_models_own_logits(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    head = TorchModel(model).head
    assert isinstance(head, LinearHead)
    assert head.post == POST_PROCESSED.get(name, PostProcessing())
    assert head.vocab_size == VOCABULARY
    ids_1L = torch.arange(9)[None]
    with torch.inference_mode():
        rows_1LD, first_two = captured(model).inputs(model, input_ids=ids_1L)
        native_LV = model(input_ids=ids_1L, use_cache=False).logits[0]
        found_LV = torch.cat([head.logits(rows_1LD[0], slice(at, at + 50)) for at in range(0, VOCABULARY, 50)], dim=1)
    tolerance = 4 * torch.finfo(dtype).eps * float(native_LV.abs().max())
    torch.testing.assert_close(found_LV, native_LV, atol=tolerance, rtol=0)
    torch.testing.assert_close(first_two[0], native_LV[:2], atol=tolerance, rtol=0)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a cap": lambda x: 30 * torch.tanh(x / 30),
    "a cap far above the logits": lambda x: 4_000 * torch.tanh(x / 4_000),
    "a factor": lambda x: 1.01 * x,
    "a shift of some ids": lambda x: x + 0.1 * (torch.arange(x.shape[-1]) % 2),
    "more ids": lambda x: torch.cat([x, x[..., :8]], dim=-1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_happens_to_logits_unsaid_is_noticed_and_the_rows_are_the_models_own_logits(name: str) -> None:
    model = hidden_change(tiny_model("llama"), CHANGES[name])
    assert linear_head(model, captured(model)) is None
    ours = TorchModel(model)
    assert ours.head == OwnLogits(VOCABULARY)


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_own_logits_score_as_an_output_layer_that_could_be_taken_apart(path: str) -> None:
    """Softmax ignores the added constant, so both heads must give the same scores."""
    apart = [TorchModel(tiny_model("llama", seed=seed)) for seed in (1, 2)]
    whole = [TorchModel(hidden_change(tiny_model("llama", seed=seed), lambda x: x + 1.0)) for seed in (1, 2)]
    assert [type(model.head) for model in (*apart, *whole)] == [LinearHead, LinearHead, OwnLogits, OwnLogits]
    for batch in batches_of(TRUNKS, apart[0], packed=path == "packed"):
        expected = scored(apart[0], apart[1], batch)
        for pair in (whole, (apart[0], whole[1]), (whole[0], apart[1])):
            for quantity, found in scored(pair[0], pair[1], batch).items():
                torch.testing.assert_close(found, expected[quantity], atol=1e-9, rtol=0, msg=quantity)


def test_own_logits_are_lent_as_a_copy() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    OwnLogits(3).logits(rows, slice(1, 3)).zero_()
    assert torch.equal(rows, torch.arange(6.0).reshape(2, 3))


def test_post_processing_divides_multiplies_and_caps() -> None:
    logits = torch.tensor([3.0, -600.0])
    assert torch.equal(PostProcessing()(logits), logits)
    assert torch.equal(PostProcessing(factor=2.0, divisor=3.0)(logits), torch.tensor([2.0, -400.0]))
    torch.testing.assert_close(PostProcessing(cap=5.0)(logits), torch.tensor([5 * np.tanh(0.6), -5.0]).float())


def test_the_output_layer_of_a_forward_sees_two_rows_only() -> None:
    model, seen = tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    ours = TorchModel(model)
    seen.clear()
    for packed in (True, False):
        for batch in batches_of(TRUNKS, ours, packed=packed):
            batch.rows(ours)
    assert set(seen) == {(1, 2)}


@pytest.mark.parametrize(
    ("output", "message"), [(None, "has no output layer"), (nn.Linear(2, 2), "did not call its output layer")]
)
def test_an_output_layer_that_is_not_there_or_not_called_is_an_error(output: nn.Module | None, message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match=message):
        CapturedHead(output).inputs(model, input_ids=torch.arange(3)[None])


@pytest.mark.parametrize("name", PACKED)
def test_a_float32_head_of_a_bfloat16_model_computes_in_float32(name: str) -> None:
    model = TorchModel(tiny_model(name, dtype=torch.bfloat16))
    rows_CD = torch.randn(3, model._model.get_output_embeddings().in_features, dtype=torch.bfloat16)
    short = model.head.logits(rows_CD, slice(0, 9))
    model.use_head(device=torch.device("cpu"), dtype=torch.float32)
    long = model.head.logits(rows_CD, slice(0, 9))
    assert (short.dtype, long.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(short.float(), long, rtol=2e-2, atol=2e-2)
    assert not torch.equal(short.float(), long)


def test_a_head_that_cannot_be_taken_apart_cannot_be_moved() -> None:
    model = TorchModel(hidden_change(tiny_model("llama"), CHANGES["a cap"]))
    with pytest.raises(CheckpointError, match="this model's output layer cannot be separated from it"):
        model.use_head(device=torch.device("cpu"), dtype=torch.float32)


def test_the_bytes_of_weights_count_a_shared_matrix_once_and_a_copied_head_too() -> None:
    tied, untied = (TorchModel(tiny_model(name, dtype=torch.bfloat16)) for name in ("qwen2", "llama"))
    for model in (tied, untied):
        before, matrix = model.weights_bytes, VOCABULARY * 32
        assert before == 2 * sum(p.numel() for p in model._model.parameters())
        model.use_head(device=torch.device("cpu"), dtype=torch.float32)
        assert model.weights_bytes == before + 4 * matrix


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "gemma2", "gpt2", "cohere"])
def test_norms_in_float32_change_those_that_round_twice_for_the_better_and_no_dtype(name: str, path: str) -> None:
    exact, plain, normed = (
        TorchModel(tiny_model(name, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    random = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(w.shape, generator=random) if "norm" in key or "ln_" in key else w
        for key, w in normed._model.state_dict().items()
    }
    for model in (exact, plain, normed):
        model._model.load_state_dict(weights)
    normed.use_norms(torch.float32)
    (batch,) = batches_of(TRUNKS, exact, packed=path == "packed", max_tokens=1000)
    rows = [batch.rows(model) for model in (exact, plain, normed)]
    assert rows[2].dtype == normed.dtype == torch.bfloat16
    errors = [float((found.float() - rows[0]).pow(2).mean().sqrt()) for found in rows[1:]]
    assert errors[1] < 1.1 * errors[0]
    assert torch.equal(rows[1], rows[2]) == (name not in {"llama", "qwen3"})


BIAS_V = torch.zeros(100)
BIAS_V[0] = 0.25


@pytest.mark.parametrize("bias_V", [None, BIAS_V], ids=["no bias", "bias"])
@pytest.mark.parametrize("post", [PostProcessing(), PostProcessing(factor=0.5, cap=30.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wanted_logit_is_not_rounded_to_the_dtype_of_the_weights(
    dtype: torch.dtype, post: PostProcessing, bias_V: Tensor | None
) -> None:
    """All other logits are 0, which is never rounded."""
    generator = torch.Generator().manual_seed(0)
    rows_RD, weight_VD = torch.randn(40, 64, generator=generator).to(dtype), torch.zeros(100, 64, dtype=dtype)
    weight_VD[0] = torch.randn(64, generator=generator)
    head = LinearHead(weight_VD, None if bias_V is None else bias_V.to(dtype), post)
    wanted = WantedIds(np.repeat(np.arange(40), 2), np.tile(np.array([0, 7], dtype=np.int32), 40))
    found = score_rows(ModelRows(rows_RD, head), ModelRows(rows_RD, head), wanted).sft_logprob_J.reshape(40, 2)
    products_RV = rows_RD.double() @ weight_VD.double().T
    exact = post(products_RV if bias_V is None else products_RV + bias_V.double()).log_softmax(dim=1)[:, [0, 7]]
    rounded = head.logits(rows_RD, slice(None)).double().log_softmax(dim=1)[:, [0, 7]]
    assert (found - exact)[:, 0].abs().max() < 5e-6
    assert (rounded - exact)[:, 0].abs().max() > 1e-3
    assert (found - exact)[:, 1].abs().max() <= 5e-6 + (rounded - exact)[:, 1].abs().max()


@pytest.mark.parametrize("largest", [20.0, 60.0, 400.0])
def test_an_id_that_has_nearly_all_of_the_probability_has_no_log_prob_above_0(largest: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rows_RD = (1 + torch.rand(50, 1, generator=generator)).to(torch.bfloat16)
    head = LinearHead(torch.tensor([[largest], [-3.0]]).to(torch.bfloat16), None, PostProcessing())
    wanted = WantedIds(np.arange(50), np.zeros(50, dtype=np.int32))
    found = score_rows(ModelRows(rows_RD, head), ModelRows(rows_RD, head), wanted).sft_logprob_J
    assert found.max() <= 0
    assert found.min() > -1e-6
