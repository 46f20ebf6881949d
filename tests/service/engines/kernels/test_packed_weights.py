"""Packed copies of weights: the same numbers, held once, taken only where they are faster and memory suffices."""

import gc
from collections.abc import Iterator

import pytest
import torch
from dense_reward.engines.kernels import packed_weights
from dense_reward.engines.kernels.packed_weights import gain, is_faster, needs_memory, packed, packed_tiles
from dense_reward.engines.torch.heads import LinearHead, PostProcessing
from dense_reward.engines.torch.model import TorchModel
from expected_rows import TRUNKS, batches_of, scored
from tiny_models import tiny_model
from torch import nn
from torch.nn import functional

DTYPES = (torch.float32, torch.bfloat16)
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which every packed weight is twice as fast, whatever its size."""
    monkeypatch.setattr(packed_weights, "gain", lambda *_: 2.0)
    yield
    gc.collect()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, 300), (7, 33, 5), (700, 96, 128), (0, 8, 8), (3, 1, 1)]
)
def test_a_packed_weight_gives_torchs_own_results(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=random).to(dtype) for shape in ((2, rows, inputs), (outputs, inputs), (outputs,))
    )
    for given in (bias, None):
        with torch.inference_mode():
            found = packed(weight)(x, given)
            strided = packed(weight)(x[:, ::2], given)
        expected = functional.linear(x.double(), weight.double(), None if given is None else given.double())
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=ERRORS[dtype] * inputs**0.5, rtol=0.02)
        torch.testing.assert_close(strided, found[:, ::2], atol=ERRORS[dtype], rtol=0.02)


@pytest.mark.parametrize("vocab_size", [10, 16, 17])
def test_tiles_of_an_output_layer_are_those_of_the_whole(vocab_size: int) -> None:
    weight, rows = torch.randn(vocab_size, 6), torch.randn(5, 6)
    tiles = packed_tiles(weight, 8)
    for start in range(0, vocab_size, 8):
        found = tiles.logits(rows, slice(start, start + 8), None)
        assert found is not None
        torch.testing.assert_close(found, rows @ weight[start : start + 8].T)
    assert tiles.logits(rows, slice(0, 7), None) is None
    assert tiles.logits(rows, slice(4, 12), None) is None


def test_models_that_hold_a_weight_together_hold_its_copy_together_and_free_it_with_the_last() -> None:
    weight = torch.randn(300, 300)
    first, second = packed(weight), packed(weight)
    assert first is second
    assert not needs_memory(weight)
    assert needs_memory(weight.clone())
    assert needs_memory(weight, 8)
    del first, second
    assert needs_memory(weight)


def test_what_is_faster_is_measured_except_for_small_matrices_and_dtypes_without_a_kernel() -> None:
    assert gain(32, 32, torch.float32, 1) == 0.0
    assert gain(512, 512, torch.float64, 1) == 0.0
    assert gain(512, 512, torch.float32, 1) > 0.0
    assert not is_faster(torch.ones(512, 512, device="meta"))


def test_a_build_of_torch_without_the_operators_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: torch.Tensor) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(packed_weights, "PackedWeight", missing)
    assert gain(511, 513, torch.float32, 1) == 0.0


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "cohere"])
def test_a_model_with_packed_weights_scores_as_without(name: str, path: str) -> None:
    plain, ours = ([TorchModel(tiny_model(name, seed=seed, dtype=torch.float32)) for seed in (1, 2)] for _ in range(2))
    for model in ours:
        said = model.pack_weights(at_most_bytes=1e9)
        assert said is not None
        assert "and the output layer" in said
        assert isinstance(model.head, LinearHead)
        assert model.head.packed is not None
    for batch in batches_of(TRUNKS, plain[0], packed=path == "packed"):
        expected = scored(plain[0], plain[1], batch, None)
        for quantity, found in scored(ours[0], ours[1], batch, None).items():
            torch.testing.assert_close(found, expected[quantity], atol=2e-5, rtol=1e-4, msg=quantity)


@pytest.mark.usefixtures("always_faster")
def test_nothing_is_packed_that_would_not_fit() -> None:
    model = TorchModel(tiny_model("llama", dtype=torch.float32))
    said = model.pack_weights(at_most_bytes=1000)
    assert said is not None
    assert said.endswith("too little is free")
    assert isinstance(model.head, LinearHead)
    assert model.head.packed is None
    linears = [module for module in model.transformers_model.modules() if isinstance(module, nn.Linear)]
    assert not [linear for linear in linears if "forward" in vars(linear)]


@pytest.mark.usefixtures("always_faster")
def test_a_head_that_cannot_be_taken_apart_leaves_the_other_weights_to_pack() -> None:
    whole = tiny_model("llama", dtype=torch.float32)
    ours = whole.forward

    def changed(*args: object, **kwargs: object) -> object:
        found = ours(*args, **kwargs)
        found.logits = torch.tanh(found.logits)
        return found

    whole.forward = changed
    model = TorchModel(whole)
    said = model.pack_weights(at_most_bytes=1e9)
    assert said is not None
    assert "output layer" not in said


def test_a_packed_head_is_post_processed() -> None:
    weight, rows = torch.randn(20, 6), torch.randn(5, 6)
    head = LinearHead(weight, None, PostProcessing(factor=2.0, cap=3.0))
    torch.testing.assert_close(head.pack().logits(rows, slice(None)), head.logits(rows, slice(None)))
