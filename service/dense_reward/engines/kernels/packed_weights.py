"""CPU matmuls with weights in the layout that oneDNN's kernels read, beside torch's own, of which the faster is taken.

torch sends float32 matmuls to MKL. On AMD's processors, and for some shapes on Intel's, MKL is half as fast as oneDNN.
oneDNN reads a weight fastest in a layout of its own choice, so a packed weight is a second copy. The result is the same
but for the order of summation.

Shapes: N rows, I inputs, O outputs; a tile of a vocabulary is O too.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional

from dense_reward.engines.kernels.measured import times_as_fast

DTYPES = (torch.float32, torch.bfloat16)
ROWS = 512
"""Rows for which weights are packed; others are computed right too."""
LEAST_ROWS, MULTIPLICATIONS = 64, 1 << 31
"""What is timed multiplies so many numbers, with between LEAST_ROWS and ROWS rows."""
COLD_BYTES, MOST_WEIGHTS = 1 << 25, 16
"""The weights that are timed, one after another, take so many bytes, unless they are too many. In a forward, too, each
weight comes from memory, and reading it is a large part of the time; a single weight would stay in a cache."""
LEAST_NUMBERS = 1 << 16
"""Smaller matrices are not worth measuring."""
LEAST_GAIN = 1.04
"""So many times as fast a packed weight must be to be worth its memory."""


class PackedWeight:
    """A copy of a weight [O, I], and its matmul."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._source = weight_OI.detach()  # keeps its storage: `packed` finds this object by that address
        self._copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), ROWS)

    def __call__(self, rows_NI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Inputs [..., I] and bias [O] -> outputs [..., O]."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(rows_NI, self._copy, bias_O, "none", [], "")
        return found


class PackedTiles:
    """A copy of an output layer [V, I], in tiles of some ids each."""

    def __init__(self, weight_VI: Tensor, tile: int) -> None:
        self._source = weight_VI.detach()
        self._tile = tile
        self._tiles = [PackedWeight(part) for part in torch.split(weight_VI, tile)]

    def logits(self, rows_NI: Tensor, tile: slice, bias_O: Tensor | None) -> Tensor | None:
        """[N, O] for one of the tiles; None for any other slice."""
        start, stop, _ = tile.indices(len(self._source))
        if start % self._tile or stop != min(start + self._tile, len(self._source)):
            return None
        return self._tiles[start // self._tile](rows_NI, bias_O)


_copies: WeakValueDictionary[Hashable, PackedWeight | PackedTiles] = WeakValueDictionary()


def packed(weight_OI: Tensor) -> PackedWeight:
    """The packed copy of a weight; the same one for models that hold this weight together."""
    copy = _copies.get(_identity(weight_OI))
    if not isinstance(copy, PackedWeight):
        copy = _copies[_identity(weight_OI)] = PackedWeight(weight_OI)
    return copy


def packed_tiles(weight_VI: Tensor, tile: int) -> PackedTiles:
    """The same for an output layer."""
    copy = _copies.get(_identity(weight_VI, tile))
    if not isinstance(copy, PackedTiles):
        copy = _copies[_identity(weight_VI, tile)] = PackedTiles(weight_VI, tile)
    return copy


def needs_memory(weight: Tensor, tile: int | None = None) -> bool:
    """Whether a packed copy would be a new one."""
    return _identity(weight, tile) not in _copies


@cache
def gain(outputs: int, inputs: int, dtype: torch.dtype, threads: int) -> float:
    """How many times as fast as torch's own matmul a packed one is, measured once; 0 if there is none.

    `threads`: torch's, on which it depends.
    """
    if dtype not in DTYPES or outputs * inputs < LEAST_NUMBERS:
        return 0.0
    numbers = outputs * inputs
    with torch.inference_mode():
        weights = min(MOST_WEIGHTS, max(1, COLD_BYTES // (numbers * dtype.itemsize)))
        rows = min(ROWS, max(LEAST_ROWS, MULTIPLICATIONS // (weights * numbers)))
        rows_NI = torch.ones(rows, inputs, dtype=dtype)
        own = [torch.ones(outputs, inputs, dtype=dtype) for _ in range(weights)]
        try:
            copies = [PackedWeight(weight_OI) for weight_OI in own]
            theirs = partial(_all, [partial(functional.linear, weight=weight_OI) for weight_OI in own], rows_NI)
            ours = partial(_all, [partial(copy, bias_O=None) for copy in copies], rows_NI)
            return times_as_fast(ours, theirs)
        except (RuntimeError, AttributeError):  # an operator that this build of torch lacks
            return 0.0


def is_faster(weight_OI: Tensor) -> bool:
    """Whether a packed copy of a weight is worth its memory on this machine."""
    if weight_OI.device.type != "cpu" or weight_OI.ndim != 2:
        return False
    return gain(*weight_OI.shape, weight_OI.dtype, torch.get_num_threads()) >= LEAST_GAIN


def _identity(weight: Tensor, tile: int | None = None) -> Hashable:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, tile


def _all(matmuls: Sequence[Callable[[Tensor], Tensor]], rows_NI: Tensor) -> None:
    for matmul in matmuls:
        matmul(rows_NI)
