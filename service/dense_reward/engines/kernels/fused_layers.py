"""Norms, rotary embeddings and gated feed-forward layers of a model, each as one kernel.

On a GPU it is one of Triton, on a CPU one of compiled.py.

transformers computes them by six, ten and two kernels, which read and write every number as often, and whose launches
take the host longer than a GPU needs for a small batch. A layer is replaced only if its kernel reproduces it: every
kind is tried on random numbers first. All arithmetic is float32 and rounded once.

Shapes: B rows, N tokens, H heads, D size of a head or of a norm, F width of a feed-forward layer.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dense_reward.engines.kernels.compiled import computed, computes, gate_of, norm_of, rotation_of
from dense_reward.engines.kernels.fused_sums import cannot_fuse

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

SHORT = (torch.bfloat16, torch.float16)
TOLERANCE = 2.0
"""Largest difference from the layer, in units of the dtype's rounding of the largest number of a row."""
_ROTATE = "apply_rotary_pos_emb"
_ELEMENTS = 1024
_fused_rotations: dict[Callable[..., object], Callable[..., object]] = {}

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _norm_kernel(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0917 - Triton has its own types
        x,  # noqa: ANN001
        weight,  # noqa: ANN001
        out,  # noqa: ANN001
        D,  # noqa: ANN001
        epsilon,  # noqa: ANN001
        ADDED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """x / sqrt(mean(x^2) + epsilon) * (ADDED + weight); one program for each row."""
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < D
        values = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
        scaled = values * tl.rsqrt(tl.sum(values * values, axis=0) / D + epsilon)
        scaled = scaled * (tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + ADDED)
        tl.store(out + row * D + at, scaled.to(out.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _gate_kernel(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        """silu(gate) * up, element by element."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        z = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        product = z / (1.0 + tl.exp(-z)) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _rotate_kernel(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0917
        x,  # noqa: ANN001
        cos,  # noqa: ANN001
        sin,  # noqa: ANN001
        out,  # noqa: ANN001
        token_stride,  # noqa: ANN001
        head_stride,  # noqa: ANN001
        H: tl.constexpr,
        HALF: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Rotate the two halves of every head of a token; one program for each token. `out` is [N, H, 2 * HALF]."""
        token = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEADS)[:, None]
        at = tl.arange(0, BLOCK)[None, :]
        inside = (head < H) & (at < HALF)
        wide = at < HALF
        place = x + token * token_stride + head * head_stride + at
        first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
        angle = token * 2 * HALF + at
        cos_1 = tl.load(cos + angle, mask=wide, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin + angle, mask=wide, other=0.0).to(tl.float32)
        cos_2 = tl.load(cos + angle + HALF, mask=wide, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin + angle + HALF, mask=wide, other=0.0).to(tl.float32)
        to = out + (token * H + head) * 2 * HALF + at
        tl.store(to, (first * cos_1 - second * sin_1).to(out.dtype.element_ty), mask=inside)
        tl.store(to + HALF, (second * cos_2 + first * sin_2).to(out.dtype.element_ty), mask=inside)


@torch.inference_mode()
def fuse_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Replace all supported layers; returns their kinds: norms, gates, rotations. None if there are no kernels."""
    if not _has_kernels(model.device, model.dtype):
        return ()
    found = [
        name
        for name, fused in (
            ("norms", sum([_fuse_norm(module) for module in _of_kind(model, "Norm")])),
            ("gates", sum([_fuse_gate(module) for module in model.modules() if hasattr(module, "gate_proj")])),
            ("rotations", _fuse_rotation(model)),
        )
        if fused
    ]
    return tuple(found)


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Triton's are for short dtypes only."""
    return cannot_fuse(device, dtype) is None and (device.type == "cpu" or dtype in SHORT)


def norm(x: Tensor, weight_D: Tensor, epsilon: float, added: float) -> Tensor:
    """Root-mean-square norm of the last dimension, times (added + weight), in x's shape and dtype."""
    if computes(x.device):
        # A tensor made in inference mode, as the inputs are with which the function was compiled.
        return computed(norm_of, x.reshape(-1, x.shape[-1]), weight_D.clone(), epsilon, added).view(x.shape)
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    if x.numel():
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _norm_kernel[(x.numel() // size,)](x, weight_D, out, size, epsilon, added, triton.next_power_of_2(size))
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in their shape and dtype."""
    if computes(gate.device):
        size = gate.shape[-1]
        return computed(gate_of, gate.reshape(-1, size), up.reshape(-1, size)).view(gate.shape)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        with torch.cuda.device_of(gate):  # type: ignore[no-untyped-call]
            _gate_kernel[(triton.cdiv(gate.numel(), _ELEMENTS),)](gate, up, out, gate.numel(), _ELEMENTS)
    return out


def rotated(x_1HND: Tensor, cos_1ND: Tensor, sin_1ND: Tensor) -> Tensor:
    """Rotary embedding of all heads: [1, H, N, D], a view of [1, N, H, D]."""
    _, heads, tokens, size = x_1HND.shape
    if computes(x_1HND.device):
        return computed(rotation_of, x_1HND[0].transpose(0, 1), cos_1ND[0], sin_1ND[0]).transpose(0, 1)[None]
    out = x_1HND.new_empty(1, tokens, heads, size)
    if tokens:
        with torch.cuda.device_of(x_1HND):  # type: ignore[no-untyped-call]
            _rotate_kernel[(tokens,)](
                x_1HND,
                cos_1ND.contiguous(),
                sin_1ND.contiguous(),
                out,
                x_1HND.stride(2),
                x_1HND.stride(1),
                heads,
                size // 2,
                triton.next_power_of_2(heads),
                triton.next_power_of_2(size // 2),
            )
    return out.transpose(1, 2)


def _of_kind(model: nn.Module, ending: str) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module).__name__.endswith(ending))


def _fuse_norm(module: nn.Module) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        not isinstance(weight, Tensor)
        or weight.ndim != 1
        or epsilon is None
        or getattr(module, "bias", None) is not None
    ):
        return False
    x = torch.randn(1, 7, len(weight), device=weight.device).mul_(3).to(weight.dtype)
    expected = module(x)
    for added in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
        if _difference(norm(x, weight, float(epsilon), added), expected) <= TOLERANCE:
            module.forward = _unless_trained(
                partial(norm, weight_D=weight, epsilon=float(epsilon), added=added), module
            )
            return True
    return False


def _fuse_gate(module: nn.Module) -> bool:
    parts = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    if not all(isinstance(part, nn.Linear) for part in parts) or "forward" in vars(module):
        return False
    gate, up, down = parts

    def forward(x: Tensor) -> Tensor:
        return down(gated(gate(x), up(x)))  # type: ignore[misc, no-any-return]

    x = torch.randn(1, 7, gate.in_features, device=gate.weight.device).to(gate.weight.dtype)  # type: ignore[union-attr]
    try:
        expected = module(x)
    except (TypeError, ValueError, RuntimeError):  # another kind of layer
        return False
    if not isinstance(expected, Tensor) or not _difference(forward(x), expected) <= 2 * TOLERANCE:
        return False
    module.forward = _unless_trained(forward, module)
    return True


def _unless_trained(fused: Callable[[Tensor], Tensor], module: nn.Module) -> Callable[..., object]:
    """The layer's own forward for calls with gradients, which the kernels do not compute, or with more arguments."""
    original: Callable[..., object] = module.forward

    def forward(x: Tensor, *args: object, **kwargs: object) -> object:
        if args or kwargs or torch.is_grad_enabled():
            return original(x, *args, **kwargs)
        return fused(x)

    return forward


def _fuse_rotation(model: PreTrainedModel) -> bool:
    """Replace the function in the model's Python module: for all models of its class that are computed by kernels."""
    code = sys.modules[type(model).__module__]
    original = getattr(code, _ROTATE, None)
    if original is None:
        return False
    if original in _fused_rotations.values():
        return True

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: object, **kwargs: object) -> object:
        plain = _has_kernels(q.device, q.dtype) and not torch.is_grad_enabled() and not args and not kwargs
        if not plain or q.shape[0] != 1 or cos.shape != (1, q.shape[2], q.shape[3]):
            return original(q, k, cos, sin, *args, **kwargs)
        return rotated(q, cos, sin), rotated(k, cos, sin)

    q, k = (torch.randn(1, 5, heads, 64, device=model.device).to(model.dtype).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn(1, 5, 64, device=model.device).to(model.dtype) for _ in range(2))
    try:
        pairs = zip(rotate(q, k, cos, sin), original(q, k, cos, sin), strict=True)  # type: ignore[call-overload]
        if not all(_difference(*pair) <= 2 * TOLERANCE for pair in pairs):
            return False
    except (TypeError, ValueError, RuntimeError):
        return False
    setattr(code, _ROTATE, rotate)
    _fused_rotations[original] = rotate
    return True


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the dtype's rounding of the largest number of its row."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    unit = expected.float().abs().amax(-1, keepdim=True) * torch.finfo(expected.dtype).eps
    return float(((found.float() - expected.float()).abs() / unit).max())
