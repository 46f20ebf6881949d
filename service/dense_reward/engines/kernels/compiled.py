"""What Triton's kernels do on GPUs, on a CPU: functions of torch, each compiled into one pass over its inputs.

torch reads and writes every number in each step of a norm, a rotary embedding, a gate or a running sum. A function here
is compiled only by `start`: a call with a dtype that was not started, or with a dimension of 1, is computed by torch
step by step. So no request ever waits for a compiler.

Shapes: B rows, N tokens, H heads, D size of a head or of a norm, F width of a feed-forward layer, C rows of logits, W
token ids of a vocabulary tile.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
ROWS = 96
"""Rows of the inputs with which functions are compiled; any other number but 0 and 1 is computed by the same code."""
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter computes the tensors of a CPU instead, as if it were a GPU."""
_started: set[torch.dtype] = set()
_lock = Lock()


def norm_of(x_BD: Tensor, weight_D: Tensor, epsilon: float, added: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * (added + weight), in x's dtype."""
    x = x_BD.float()
    scale_B1 = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + epsilon)
    return (x * scale_B1 * (added + weight_D.float())).to(x_BD.dtype)


def gate_of(gate_BF: Tensor, up_BF: Tensor) -> Tensor:
    """silu(gate) * up."""
    z = gate_BF.float()
    return (z / (1 + torch.exp(-z)) * up_BF.float()).to(gate_BF.dtype)


def rotation_of(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotate the two halves of every head."""
    half = x_NHD.shape[2] // 2
    x, cos, sin = x_NHD.float(), cos_ND.float()[:, None], sin_ND.float()[:, None]
    first, second = x[..., :half], x[..., half:]
    rotated = first * cos[..., :half] - second * sin[..., :half], second * cos[..., half:] + first * sin[..., half:]
    return torch.cat(rotated, dim=2).to(x_NHD.dtype)


def sums_of(sft_CW: Tensor, reference_CW: Tensor, sums: Tensor) -> Tensor:
    """`fused_sums._absorb` without expectations."""
    largest_C, total_C, _, _ = _softmax(sft_CW.float(), sums[0], sums[1])
    reference_largest_C, reference_total_C, _, _ = _softmax(reference_CW.float(), sums[2], sums[3])
    return torch.stack([largest_C, total_C, reference_largest_C, reference_total_C, sums[4], sums[5]])


def expectations_of(sft_CW: Tensor, reference_CW: Tensor, sums: Tensor) -> Tensor:
    """`fused_sums._absorb` with expectations."""
    z, y = sft_CW.float(), reference_CW.float()
    largest_C, total_C, shrink_C, weights_CW = _softmax(z, sums[0], sums[1])
    reference_largest_C, reference_total_C, _, _ = _softmax(y, sums[2], sums[3])
    logit_C = sums[4] * shrink_C + torch.where(weights_CW == 0, 0.0, weights_CW * z).sum(dim=1)
    ratio_C = sums[5] * shrink_C + torch.where(weights_CW == 0, 0.0, weights_CW * (z - y)).sum(dim=1)
    return torch.stack([largest_C, total_C, reference_largest_C, reference_total_C, logit_C, ratio_C])


def moments_of(sft_CW: Tensor, reference_CW: Tensor, sums: Tensor) -> Tensor:
    """`fused_sums._absorb` with moments; row_sums._Moments has the formulas."""
    z = sft_CW.float()
    largest_C, _, shrink_C, weights_CW = _softmax(z, sums[0], sums[1])
    moved_C = torch.where(shrink_C == 0, 0.0, sums[0] - largest_C)
    below_CW = torch.where(weights_CW == 0, 0.0, z - largest_C[:, None])
    first_C, second_C = sums[6], sums[7] + moved_C * (2 * sums[6] + moved_C * sums[1])
    first_C = (first_C + moved_C * sums[1]) * shrink_C + (weights_CW * below_CW).sum(dim=1)
    second_C = second_C * shrink_C + (weights_CW * below_CW * below_CW).sum(dim=1)
    expected = expectations_of(sft_CW, reference_CW, sums[:6])
    return torch.cat([expected, torch.stack([first_C, second_C])])


def _softmax(logits_CW: Tensor, largest_C: Tensor, total_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest logit and the sum of exp(logit - largest) so far, the factor of earlier sums, the tile's weights."""
    most_C = torch.maximum(largest_C, logits_CW.amax(dim=1))
    shrink_C = torch.exp(largest_C - most_C)
    weights_CW = torch.exp(logits_CW - most_C[:, None])
    return most_C, total_C * shrink_C + weights_CW.sum(dim=1), shrink_C, weights_CW


_compiled: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    function: torch.compile(function, dynamic=True, fullgraph=True)
    for function in (norm_of, gate_of, rotation_of, sums_of, expectations_of, moments_of)
}


def computes(device: torch.device) -> bool:
    """Whether this module computes the tensors of a device."""
    return device.type == "cpu" and not interpreted


def computed(function: Callable[..., Tensor], *inputs: Tensor | float) -> Tensor:
    """A function of this module, compiled if it was for such inputs."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    plain = tensors[0].dtype not in _started or any(min(tensor.shape) < 2 for tensor in tensors)
    if plain:
        return function(*inputs)
    dense = (value.contiguous() if isinstance(value, Tensor) else value for value in inputs)
    return _compiled[function](*dense)


@contextmanager
def off() -> Iterator[None]:
    """Compute step by step meanwhile, as if nothing was compiled, in all of the process."""
    kept = set(_started)
    _started.clear()
    try:
        yield
    finally:
        _started.update(kept)


def is_started(dtype: torch.dtype) -> bool:
    """Whether functions of such inputs are compiled."""
    return dtype in _started


@torch.inference_mode()
def start(dtype: torch.dtype) -> str | None:
    """Compile all functions for a dtype, once for this process: 10 to 20 seconds, the next time about 4.

    Returns None, or why nothing is compiled. The compiled files are kept in a folder that only this user can write.
    """
    with _lock:
        if dtype in _started:
            return None
        if dtype not in DTYPES:
            return f"there are none for {str(dtype).removeprefix('torch.')}"
        if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
            return "there is no C++ compiler"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_private_folder()))
        os.environ.setdefault(
            "TORCHINDUCTOR_COMPILE_THREADS", "1"
        )  # else it leaves processes behind that wait for work
        try:
            with torch.compiler.set_stance("default"), warnings.catch_warnings(action="ignore"):
                _compile_all(dtype)
        except Exception as error:  # a compiler fails in any way; torch computes then
            return f"the compiler failed ({' '.join(str(error).split()[:20])})"
        torch.compiler.set_stance("eager_on_recompile")  # whatever else a call has, it must not compile
        _started.add(dtype)
        return None


def _compile_all(dtype: torch.dtype) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    _compiled[norm_of](random(ROWS, 64), random(64), 1e-6, 0.0)
    _compiled[gate_of](random(ROWS, 192), random(ROWS, 192))
    _compiled[rotation_of](random(ROWS, 4, 32), random(ROWS, 32), random(ROWS, 32))
    for function, kept in ((sums_of, 6), (expectations_of, 6), (moments_of, 8)):
        for words in (320, 5000):  # a tile, and a vocabulary that is not tiled: the compiler tells them apart
            _compiled[function](random(ROWS, words), random(ROWS, words), torch.randn(kept, ROWS))


def _private_folder() -> Path:
    """A folder for compiled code that no other user can write, because this process will run it."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "dense-reward" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.stat()
        if stat.st_uid == os.getuid() and not stat.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    return Path(tempfile.mkdtemp(prefix="dense-reward-"))
