"""Weights that are equal to the bit are held once; a model stays what it is if another one is freed or changed."""

import copy
import gc

import pytest
import torch
from dense_reward.engines.torch.memory import hold_once, same_bits, stored_bytes
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.records import Wants
from faulty_engines import INFO
from tiny_models import random_trunk, tiny_model

TOP = "model.layers.1.mlp.down_proj.weight"


def two_models(name: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[TorchModel, TorchModel]:
    """A model, and a copy with one other matrix in its upper layer."""
    one = tiny_model(name, seed=1, dtype=dtype)
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.get_parameter(TOP).add_(0.5)
    return TorchModel(one), TorchModel(other)


def logprobs(model: TorchModel) -> list[float]:
    return model.logprobs([1, 2, 3], [4, 5, 6])


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # qwen2: the output layer is the embedding
def test_all_but_the_matrix_that_differs_is_held_once(name: str) -> None:
    one, other = two_models(name)
    expected, whole = logprobs(other), one.weights_bytes
    assert other.weights_bytes == whole
    own = one.weights[TOP].nbytes
    assert hold_once(other.weights, [one.weights]) == whole - own
    assert stored_bytes([*one.weights.values(), *other.weights.values()]) == whole + own
    assert PairEngine(one, other, INFO, ComputeOptions(100)).weights_bytes == whole + own
    assert [key for key, weight in other.weights.items() if weight.data_ptr() != one.weights[key].data_ptr()] == [TOP]
    assert logprobs(other) == expected
    assert hold_once(other.weights, [one.weights]) == 0


def test_a_model_outlives_the_one_that_it_shares_with() -> None:
    one, other = two_models()
    expected = logprobs(other)
    hold_once(other.weights, [one.weights])
    del one
    gc.collect()
    [torch.full((258, 32), 7.0) for _ in range(20)]  # takes freed memory
    assert logprobs(other) == expected


def test_norms_that_one_model_converts_later_stay_as_they_are_in_the_other() -> None:
    one, other = two_models(dtype=torch.bfloat16)
    expected, norm = logprobs(one), one.weights["model.norm.weight"].clone()
    hold_once(other.weights, [one.weights])
    other.use_norms(torch.float32)
    assert logprobs(one) == expected
    assert same_bits(one.weights["model.norm.weight"], norm)


def test_a_copied_output_layer_is_held_once_too() -> None:
    one, other = two_models(dtype=torch.bfloat16)
    for model in (one, other):
        model.use_head(device=torch.device("cpu"), dtype=torch.float32)
    copied = one.weights["(output layer)"].nbytes
    assert one.weights_bytes == stored_bytes(one.transformers_model.parameters()) + copied
    assert hold_once(other.weights, [one.weights]) == one.weights_bytes - one.weights[TOP].nbytes


def test_each_weight_is_taken_from_whichever_model_has_it() -> None:
    one, other = two_models()
    hold_once(other.weights, [one.weights])
    third = TorchModel(copy.deepcopy(other.transformers_model))
    assert hold_once(third.weights, [one.weights, other.weights]) == third.weights_bytes
    trunk = random_trunk(0)
    pair = PairEngine(other, third, INFO, ComputeOptions(100))
    assert pair.weights_bytes == other.weights_bytes
    assert not any(s.kl_S.any() for s in pair.score([trunk], Wants(kl=True))[0] if s.kl_S is not None)


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64),
        torch.tensor([[-0.0, 1.0], [2.0, 3.0]]),
        torch.tensor([[0.0, 1.0, 2.0, 3.0]]),
        torch.tensor([[0.0, 2.0], [1.0, 3.0]]).T,
        torch.empty(2, 2, device="meta"),
    ],
    ids=["dtype", "sign of zero", "shape", "layout", "device"],
)
def test_what_is_not_the_same_to_the_bit_stays_apart(other: torch.Tensor) -> None:
    one = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert same_bits(one, one.clone())
    assert not same_bits(one, other)
    assert hold_once({"a": other}, [{"a": one}]) == 0


def test_nan_and_weights_of_other_names() -> None:
    one = torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16)
    assert same_bits(one, one.clone())
    assert hold_once({"a": one.clone()}, [{"b": one}]) == 0
