"""The kernels for norms, gates and rotations, against transformers; a GPU's by Triton's interpreter without one."""

import pytest
import torch
from dense_reward.engines.kernels import fused_layers
from dense_reward.engines.kernels.fused_layers import fuse_layers, gated, norm, rotated
from kernel_ways import way  # noqa: F401
from tiny_models import tiny_model
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def some(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def rounding(dtype: torch.dtype) -> float:
    return 2 * torch.finfo(dtype).eps


@DTYPES
@pytest.mark.parametrize("size", [1, 96, 100, 1100])
@pytest.mark.parametrize(("kind", "added"), [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_norms(kind: type[torch.nn.Module], added: float, size: int, dtype: torch.dtype) -> None:
    module = kind(size, eps=1e-5).to(DEVICE, dtype)
    module.weight.data = some(size, dtype=dtype, seed=1)
    for shape in ((1, 7, size), (1, 3, 2, size), (1, 0, size)):
        x = some(*shape, dtype=dtype)
        found = norm(x, module.weight.data, 1e-5, added)
        torch.testing.assert_close(found, module(x).detach(), atol=rounding(dtype), rtol=rounding(dtype))


@DTYPES
def test_gates(dtype: torch.dtype) -> None:
    gate, up = (some(1, 7, 333, dtype=dtype, seed=seed) for seed in (1, 2))
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(gated(gate, up), expected.to(dtype), atol=rounding(dtype), rtol=rounding(dtype))


@DTYPES
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 64), (5, 96)])
def test_rotations_of_a_view(heads: int, size: int, dtype: torch.dtype) -> None:
    x = some(1, 6, heads, size, dtype=dtype).transpose(1, 2)
    cos, sin = (some(1, 6, size, dtype=dtype, seed=seed) for seed in (3, 4))
    expected, _ = apply_rotary_pos_emb(x.double(), x.double(), cos.double(), sin.double())
    found = rotated(x, cos, sin)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected.to(dtype), atol=4 * rounding(dtype), rtol=rounding(dtype))


def test_on_a_cpu_layers_are_replaced_once_kernels_are_compiled(way: str) -> None:  # noqa: F811
    model = tiny_model("llama", dtype=torch.bfloat16)
    if way == "compiled":
        assert fuse_layers(model) == ("norms", "gates", "rotations")
        return
    assert fuse_layers(model) == ()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_norm_that_is_none_of_these_is_left_as_it_is() -> None:
    class OtherNorm(torch.nn.Module):
        def __init__(self, power: float) -> None:
            super().__init__()
            self.weight, self.eps, self.power = torch.nn.Parameter(torch.rand(64) + 0.5), 1e-5, power

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.pow(2).mean(-1, keepdim=True) + self.eps) ** self.power * self.weight

    with torch.inference_mode():
        assert fused_layers._fuse_norm(OtherNorm(0.5).to(DEVICE))
        assert not fused_layers._fuse_norm(OtherNorm(0.49).to(DEVICE))
        assert not fused_layers._fuse_norm(torch.nn.LayerNorm(64).to(DEVICE))


def test_a_replaced_layer_keeps_its_own_way_for_gradients_and_for_more_arguments(way: str) -> None:  # noqa: F811
    if way == "compiled":
        pytest.skip("it runs in inference mode, which has no gradients")

    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.rand(64) + 0.5), 1e-5

        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
            return out if gate is None else out * gate

    module = Gated().to(DEVICE)
    x = torch.randn(1, 3, 64, device=DEVICE)
    with torch.inference_mode():
        assert fused_layers._fuse_norm(module)
        torch.testing.assert_close(module(x, torch.zeros(())), torch.zeros_like(x))
        torch.testing.assert_close(module(x), norm(x, module.weight, 1e-5, 0.0))
    module(x).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.abs().sum() > 0


def test_a_gate_with_another_activation_is_left_as_it_is() -> None:
    config = tiny_model("llama").config
    for activation, fused in (("silu", True), ("gelu", False)):
        config.hidden_act = activation
        layer = type(tiny_model("llama").model.layers[0].mlp)(config).to(DEVICE)
        with torch.inference_mode():
            assert fused_layers._fuse_gate(layer) is fused
        assert ("forward" in vars(layer)) is fused


@pytest.mark.gpu
def test_a_llama_is_replaced_whole() -> None:
    assert fuse_layers(tiny_model("llama", dtype=torch.bfloat16).to("cuda")) == ("norms", "gates", "rotations")
