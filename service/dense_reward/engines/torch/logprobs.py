"""THE token log-prob function: two models' head inputs -> log-probs, kl, entropy, alternatives, in one pass.

The output layers run on chunks of rows and tiles of the vocabulary, both models tile by tile. So the logits of all rows
over the whole vocabulary never exist, and on a CPU a tile is reduced while it is still in the cache. A softmax is kept
as a running maximum and a running sum, at least in float32; the few numbers that remain of a row are combined in
float64.

Shapes: R rows that predict a token, V vocabulary size, J wanted ids (targets and candidates, each at one row), C rows
of a chunk, W token ids of a vocabulary tile, K alternatives, M models, X whatever a model's head takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dense_reward.engines.kernels.fused_sums import FusedSums, cannot_fuse
from dense_reward.engines.kernels.row_sums import Pair, RowSums, TorchSums
from dense_reward.engines.kernels.varlen import on_device
from dense_reward.records import IdArray, Wants

NOTHING_MORE = Wants()
_CHUNK_STRIDE = 1 << 32  # above every token id, so that chunk * stride + id sorts by chunk first


class Head(Protocol):
    """A model's output layer with all that the model does to its result."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def tiled(self) -> bool:
        """Whether the logits of a few token ids cost less than those of all."""
        ...

    def logits(self, rows_CX: Tensor, tile: slice) -> Tensor:
        """The model's own logits of a vocabulary tile, [C, W]. A new tensor: the caller overwrites it."""
        ...

    def exact_logits(self, rows_JX: Tensor, id_J: Tensor) -> Tensor | None:
        """The logit of one token id for each row, float32 [J], before any rounding; None if `logits` rounds nothing."""
        ...


@dataclass(frozen=True, slots=True)
class ModelRows:
    """One model's share: the inputs of its output layer at the rows that predict, and that layer."""

    rows_RX: Tensor
    head: Head


@dataclass(frozen=True, slots=True)
class Tiling:
    """How much is computed at once: rows of a chunk, token ids of a vocabulary tile."""

    rows: int
    vocab: int


# 8 MB of float32 logits for each model: both stay in a CPU's cache while they are reduced.
CPU_TILING = Tiling(1024, 2048)
CUDA_TILING = Tiling(4096, 16_384)


@dataclass(frozen=True, slots=True)
class WantedIds:
    """Token ids whose log-probs are wanted, each with its row. On the host, so that no call waits for the device."""

    row_J: NDArray[np.int64]
    id_J: IdArray


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Log-probs of the wanted ids, and the requested quantities of each row, in nats; varentropy in nats squared.

    On the device of the rows.
    """

    sft_logprob_J: Tensor
    reference_logprob_J: Tensor
    kl_R: Tensor | None
    entropy_R: Tensor | None
    varentropy_R: Tensor | None
    top_ids_RK: Tensor | None
    top_sft_logprob_RK: Tensor | None
    top_reference_logprob_RK: Tensor | None


def score_rows(
    sft: ModelRows,
    reference: ModelRows,
    wanted: WantedIds,
    wants: Wants = NOTHING_MORE,
    *,
    tiling: Tiling | None = None,
) -> ScoredRows:
    """Log-probs of the wanted ids under both models, and the quantities of every row that `wants` requests.

    Both models' rows are on one device, and their heads have one vocabulary. kl is summed over all of it. The rounding
    of nearly identical distributions can make that sum negative, so it is clamped at 0. Only what is requested is
    computed.
    """
    wanted_logits = WantedLogits(wanted, (sft.head, reference.head), sft.rows_RX.device, tiling=tiling)
    return score_pairs((sft, reference), ((0, 1),), wanted_logits, wants)[0]


def score_pairs(
    models: Sequence[ModelRows], pairs: Sequence[Pair], wanted: "WantedLogits", wants: Wants = NOTHING_MORE
) -> list[ScoredRows]:
    """The same for several pairs of models that saw the same rows; a model's logits are computed once for all pairs."""
    tiling = wanted.tiling
    chunks: list[RowSums] = []
    for part in _parts(len(models[0].rows_RX), tiling.rows):
        chunk: RowSums | None = None
        for tile in _parts(models[0].head.vocab_size, tiling.vocab):
            logits = [_logits(model, part, tile) for model in models]
            wanted.pick(models, logits, part, tile)  # before `add`, which overwrites the logits
            if chunk is None:
                sums = FusedSums if _can_fuse(logits[0]) else TorchSums
                chunk = sums(len(models), pairs, wants)
                chunks.append(chunk)
            chunk.add(logits, tile.start)
    totals = zip(*(chunk.log_totals() for chunk in chunks), strict=True)
    logprobs = wanted.logprobs([torch.cat(total_C) for total_C in totals])
    found = []
    for at, (sft, reference) in enumerate(pairs):
        quantities = zip(*(chunk.quantities(at) for chunk in chunks), strict=True)
        found.append(ScoredRows(logprobs[sft], logprobs[reference], *map(_joined, quantities)))
    return found


def _can_fuse(logits_CW: Tensor) -> bool:
    """The fused sums are float32."""
    return logits_CW.dtype is not torch.float64 and cannot_fuse(logits_CW.device, logits_CW.dtype) is None


def _logits(model: ModelRows, part: slice, tile: slice) -> Tensor:
    """A tile of one model's logits that may be overwritten, at least in float32 unless a kernel converts them."""
    logits_CW = model.head.logits(model.rows_RX[part], tile)
    if logits_CW.device.type == "cpu" and _can_fuse(logits_CW):
        return logits_CW
    # The matmul stays in the head's dtype; everything after it is float32, because the 8 significant bits of a bfloat16
    # are too few for a sum over a vocabulary. float64 logits stay float64.
    return logits_CW.to(torch.promote_types(logits_CW.dtype, torch.float32))


def _tiling(heads: Sequence[Head], device: torch.device, requested: Tiling | None) -> Tiling:
    """As requested, or the device's default; as many logits, but of the whole vocabulary, if a head is not tiled."""
    tiling = requested or (CPU_TILING if device.type == "cpu" else CUDA_TILING)
    if all(head.tiled for head in heads):
        return tiling
    vocab_size = heads[0].vocab_size
    return Tiling(max(1, tiling.rows * tiling.vocab // vocab_size), vocab_size)


def _parts(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`; for a count of 0 one empty slice, so that results have their dtypes."""
    return (slice(start, min(start + size, count)) for start in range(0, max(count, 1), size))


def _joined(column: Sequence[Tensor | None]) -> Tensor | None:
    parts = [part for part in column if part is not None]
    return torch.cat(parts) if parts else None


class WantedLogits:
    """The logits of the wanted ids of one batch, picked from the tiles and turned into log-probs at the end.

    The wanted ids are sorted by chunk and id on the host, so those of one tile are one slice. Searching for it on the
    host means that the device is never asked where they are: a copy back would wait for all queued kernels. Made before
    the models run, so that its index tensors reach the device while these compute.
    """

    def __init__(
        self, wanted: WantedIds, heads: Sequence[Head], device: torch.device, *, tiling: Tiling | None = None
    ) -> None:
        self.tiling = tiling = _tiling(heads, device, tiling)
        chunk_J = wanted.row_J // tiling.rows
        self._order_J = np.lexsort((wanted.id_J, chunk_J))  # the last key sorts first: by chunk, then by id
        self._place_J = (chunk_J * np.int64(_CHUNK_STRIDE) + wanted.id_J)[self._order_J]
        self._row_J = on_device(wanted.row_J[self._order_J], device)
        # the column within its tile: every tile starts at a multiple of its size
        self._column_J = on_device(wanted.id_J[self._order_J].astype(np.int64) % tiling.vocab, device)
        self._back_J = on_device(np.argsort(self._order_J), device)
        self._chunk_rows = tiling.rows
        self._logits_MJ: Tensor | None = None
        self._exact_J: dict[int, Tensor] = {}

    def pick(self, models: Sequence[ModelRows], logits: Sequence[Tensor], part: slice, tile: slice) -> None:
        """Copy the logits of the wanted ids in this tile, of each of M models. Those that are rounded, also exactly."""
        if self._logits_MJ is None:
            shape = len(logits), len(self._row_J)
            dtype = torch.promote_types(logits[0].dtype, torch.float32)
            self._logits_MJ = torch.empty(shape, dtype=dtype, device=logits[0].device)
        chunk = part.start // self._chunk_rows * _CHUNK_STRIDE
        start, stop = np.searchsorted(self._place_J, [chunk + tile.start, chunk + tile.stop])
        row_J, column_J = self._row_J[start:stop], self._column_J[start:stop]
        index = row_J - part.start, column_J
        for at, (model, logits_CW) in enumerate(zip(models, logits, strict=True)):
            self._logits_MJ[at, start:stop] = logits_CW[index]
            exact_J = model.head.exact_logits(model.rows_RX[row_J], column_J + tile.start)
            if exact_J is not None:
                if at not in self._exact_J:
                    self._exact_J[at] = torch.empty_like(self._logits_MJ[at])
                self._exact_J[at][start:stop] = exact_J

    def logprobs(self, totals: Sequence[Tensor]) -> list[Tensor]:
        """Each model's log-probs in the order of the wanted ids, given its rows' log sum exp, float64 [R]."""
        if self._logits_MJ is None:
            raise RuntimeError("no tile was computed")
        found = []
        for at, (picked_J, log_total_R) in enumerate(zip(self._logits_MJ, totals, strict=True)):
            logprob_J = picked_J - log_total_R[self._row_J]  # in float64, then rounded once to the logits' dtype
            if at in self._exact_J:
                error_J = self._exact_J[at].double() - picked_J
                logprob_J = _corrected(logprob_J, torch.where(picked_J.isfinite(), error_J, 0.0))
            found.append(logprob_J.to(picked_J.dtype)[self._back_J])
        return found


def _corrected(logprob_J: Tensor, error_J: Tensor) -> Tensor:
    """Log-probs, with the rounding error of the ids' own logits taken out of both logit and log sum exp."""
    others_J = torch.log((-torch.expm1(logprob_J)).clamp_min(0))  # the log of the share of all other ids
    return -functional.softplus(others_J - (logprob_J + error_J), threshold=40)
