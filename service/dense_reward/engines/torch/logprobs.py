"""THE token log-prob function: two models' head inputs -> log-probs, kl, entropy and alternatives, in one pass.

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

from dense_reward.records import IdArray, Wants

Pair = tuple[int, int]
"""Indices of the sft model and of the reference among the models."""
_Top = tuple[Tensor, Tensor, Tensor]
"""The likeliest token ids so far: ids, sft logits, reference logits, [C, K] each."""

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
    """Log-probs of the wanted ids, and the requested quantities of each row, in nats. On the device of the rows."""

    sft_logprob_J: Tensor
    reference_logprob_J: Tensor
    kl_R: Tensor | None
    entropy_R: Tensor | None
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
    return score_pairs((sft, reference), ((0, 1),), wanted, wants, tiling=tiling)[0]


def score_pairs(
    models: Sequence[ModelRows],
    pairs: Sequence[Pair],
    wanted: WantedIds,
    wants: Wants = NOTHING_MORE,
    *,
    tiling: Tiling | None = None,
) -> list[ScoredRows]:
    """The same for several pairs of models that saw the same rows; a model's logits are computed once for all pairs."""
    tiling = _tiling(models, tiling)
    picked = _WantedLogits(wanted, tiling, models[0].rows_RX.device)
    chunks = []
    for part in _parts(len(models[0].rows_RX), tiling.rows):
        chunk = _Chunk(len(models), pairs, wants)
        for tile in _parts(models[0].head.vocab_size, tiling.vocab):
            logits = [_logits(model, part, tile) for model in models]
            picked.pick(logits, part, tile)  # before `add`, which overwrites the logits
            chunk.add(logits, tile.start)
        chunks.append(chunk)
    totals = zip(*(chunk.log_totals() for chunk in chunks), strict=True)
    logprobs = picked.logprobs([torch.cat(total_C) for total_C in totals])
    found = []
    for at, (sft, reference) in enumerate(pairs):
        quantities = zip(*(chunk.quantities(at) for chunk in chunks), strict=True)
        found.append(ScoredRows(logprobs[sft], logprobs[reference], *map(_joined, quantities)))
    return found


def _logits(model: ModelRows, part: slice, tile: slice) -> Tensor:
    """A tile of one model's logits that may be overwritten, at least in float32."""
    logits_CW = model.head.logits(model.rows_RX[part], tile)
    # The matmul stays in the head's dtype; everything after it is float32, because the 8 significant bits of a bfloat16
    # are too few for a sum over a vocabulary. float64 logits stay float64.
    return logits_CW.to(torch.promote_types(logits_CW.dtype, torch.float32))


def _tiling(models: Sequence[ModelRows], requested: Tiling | None) -> Tiling:
    """As requested, or the device's default; as many logits, but of the whole vocabulary, if a head is not tiled."""
    tiling = requested or (CPU_TILING if models[0].rows_RX.device.type == "cpu" else CUDA_TILING)
    if all(model.head.tiled for model in models):
        return tiling
    vocab_size = models[0].head.vocab_size
    return Tiling(max(1, tiling.rows * tiling.vocab // vocab_size), vocab_size)


def _parts(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`; for a count of 0 one empty slice, so that results have their dtypes."""
    return (slice(start, min(start + size, count)) for start in range(0, max(count, 1), size))


def _joined(column: Sequence[Tensor | None]) -> Tensor | None:
    parts = [part for part in column if part is not None]
    return torch.cat(parts) if parts else None


class _Softmax:
    """log sum exp over the tiles so far, [C].

    Invariant after every tile: `_largest_C` is the largest logit so far, and `total_C` the sum of exp(logit - largest)
    over all tiles so far. A tile that raises the maximum shrinks the earlier sum by exp(old - new largest), so no
    exponent is ever positive and nothing overflows.
    """

    def __init__(self) -> None:
        # Finite rather than -inf: -inf - -inf is NaN, and a tile may hold only ids that the model rules out.
        self._largest_C = torch.tensor(torch.finfo(torch.float32).min)
        self.total_C = torch.zeros(())  # without a dimension until the first tile

    def add(self, logits_CW: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """Add a tile. Returns exp(logit - largest), [C, W], and the factor by which earlier sums shrink, [C].

        Unless `keep`, the result is in the memory of the logits, which are lost.
        """
        largest_C = logits_CW.amax(dim=1).clamp_min(torch.finfo(torch.float32).min)  # NaN stays NaN
        if self.total_C.ndim:
            largest_C = torch.maximum(self._largest_C, largest_C)
        else:
            # The first tile sets device and dtype, and its own maximum: the factor below is exactly 1.
            self._largest_C, self.total_C = largest_C, torch.zeros_like(largest_C)
        shrink_C = (self._largest_C - largest_C).exp_()
        weights_CW = (logits_CW - largest_C[:, None] if keep else logits_CW.sub_(largest_C[:, None])).exp_()
        self.total_C = self.total_C * shrink_C + weights_CW.sum(dim=1)
        self._largest_C = largest_C
        return weights_CW, shrink_C

    def log_total_C(self) -> Tensor:  # noqa: N802 - names carry shapes
        """log sum exp, float64: a log-prob is a small difference between a logit and this, which may both be large."""
        return self._largest_C.double() + self.total_C.double().log()


class _Chunk:
    """The running sums of C rows, over the tiles of their logits so far.

    kl and entropy are expectations under the sft model. Their sums carry the same weights exp(sft logit - largest) as
    its softmax, and shrink with it; `quantities` divides them by its total.
    """

    def __init__(self, models: int, pairs: Sequence[Pair], wants: Wants) -> None:
        self._softmaxes = [_Softmax() for _ in range(models)]
        self._pairs = pairs
        self._wants = wants
        self._sft_models = sorted({sft for sft, _ in pairs})
        # Weighted sums: of (sft logit - reference logit) for each pair, of the sft logit for each model.
        self._log_ratio_C: list[Tensor | float] = [0.0] * len(pairs)
        self._sft_logit_C: list[Tensor | float] = [0.0] * models
        self._top: list[_Top | None] = [None] * len(pairs)

    def add(self, logits: Sequence[Tensor], first_id: int) -> None:
        """Add a tile of every model's logits, [C, W] each, which this overwrites.

        The order of the steps matters: each overwrites only logits that no later step reads.
        """
        if self._wants.top_k:
            for at, (sft, reference) in enumerate(self._pairs):
                two = logits[sft], logits[reference]
                self._top[at] = _top(self._top[at], two, first_id, self._wants.top_k)
        weighted = {}
        for model in self._sft_models:
            # kl and entropy need the logits and their weights at the same time; else the weights overwrite the logits.
            keep = self._wants.kl or self._wants.entropy
            weighted[model] = weights_CW, shrink_C = self._softmaxes[model].add(logits[model], keep=keep)
            if self._wants.entropy:
                self._sft_logit_C[model] = self._sft_logit_C[model] * shrink_C + _expected(weights_CW, logits[model])
        if self._wants.kl:
            for at, (sft, _) in enumerate(self._pairs):
                weights_CW, shrink_C = weighted[sft]
                log_ratio_CW = self._log_ratios(logits, at)
                self._log_ratio_C[at] = self._log_ratio_C[at] * shrink_C + _expected(weights_CW, log_ratio_CW)
        # Models that are only references come last: kl above still read their logits.
        for model in set(range(len(logits))).difference(self._sft_models):
            self._softmaxes[model].add(logits[model], keep=False)

    def _log_ratios(self, logits: Sequence[Tensor], at: int) -> Tensor:
        """Log-ratios of a pair up to a per-row constant. Overwrites the sft logits if no later pair needs them."""
        sft, reference = self._pairs[at]
        needed = any(sft in pair for pair in self._pairs[at + 1 :])
        return logits[sft] - logits[reference] if needed else logits[sft].sub_(logits[reference])

    def log_totals(self) -> list[Tensor]:
        """log sum exp of every model's logits, float64 [C]."""
        return [softmax.log_total_C() for softmax in self._softmaxes]

    def quantities(self, at: int) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Of a pair: kl, entropy, then ids and both log-probs of the alternatives; None for what is not requested."""
        model, reference = self._pairs[at]
        total_C = self._softmaxes[model].total_C
        sft_C, reference_C = self._softmaxes[model].log_total_C(), self._softmaxes[reference].log_total_C()
        kl = entropy = None
        if self._wants.kl:
            # E[log p - log q] = E[sft logit - reference logit] - (sft log sum exp - reference log sum exp)
            kl = self._log_ratio_C[at] / total_C.double() - (sft_C - reference_C)
            kl = kl.clamp_min(0.0).to(total_C.dtype)
        if self._wants.entropy:
            # -E[log p] = sft log sum exp - E[sft logit]
            entropy = (sft_C - self._sft_logit_C[model] / total_C.double()).to(total_C.dtype)
        top = self._top[at]
        if top is None:
            return kl, entropy, None, None, None
        ids, sft, found = top
        dtype = total_C.dtype
        return kl, entropy, ids, (sft - sft_C[:, None]).to(dtype), (found - reference_C[:, None]).to(dtype)


class _WantedLogits:
    """The logits of the wanted ids, picked from the tiles and turned into log-probs at the end.

    The wanted ids are sorted by chunk and id on the host, so those of one tile are one slice. Searching for it on the
    host means that the device is never asked where they are: a copy back would wait for all queued kernels.
    """

    def __init__(self, wanted: WantedIds, tiling: Tiling, device: torch.device) -> None:
        chunk_J = wanted.row_J // tiling.rows
        self._order_J = np.lexsort((wanted.id_J, chunk_J))  # the last key sorts first: by chunk, then by id
        self._place_J = (chunk_J * np.int64(_CHUNK_STRIDE) + wanted.id_J)[self._order_J]
        self._row_J = torch.from_numpy(wanted.row_J[self._order_J]).to(device)
        # the column within its tile: every tile starts at a multiple of its size
        self._column_J = torch.from_numpy(wanted.id_J[self._order_J].astype(np.int64) % tiling.vocab).to(device)
        self._chunk_rows = tiling.rows
        self._logits_MJ: Tensor | None = None

    def pick(self, logits: Sequence[Tensor], part: slice, tile: slice) -> None:
        """Copy the logits of the wanted ids in this tile, of each of M models."""
        if self._logits_MJ is None:
            shape = len(logits), len(self._row_J)
            self._logits_MJ = torch.empty(shape, dtype=logits[0].dtype, device=logits[0].device)
        chunk = part.start // self._chunk_rows * _CHUNK_STRIDE
        start, stop = np.searchsorted(self._place_J, [chunk + tile.start, chunk + tile.stop])
        index = self._row_J[start:stop] - part.start, self._column_J[start:stop]
        for picked_J, logits_CW in zip(self._logits_MJ, logits, strict=True):
            picked_J[start:stop] = logits_CW[index]

    def logprobs(self, totals: Sequence[Tensor]) -> list[Tensor]:
        """Each model's log-probs in the order of the wanted ids, given its rows' log sum exp, float64 [R]."""
        if self._logits_MJ is None:
            raise RuntimeError("no tile was computed")
        back_J = torch.from_numpy(np.argsort(self._order_J)).to(self._row_J.device)
        # subtracted in float64, then rounded once to the logits' dtype
        return [
            (picked_J - log_total_R[self._row_J]).to(picked_J.dtype)[back_J]
            for picked_J, log_total_R in zip(self._logits_MJ, totals, strict=True)
        ]


def _top(best: _Top | None, pair: tuple[Tensor, Tensor], first_id: int, k: int) -> _Top:
    """The likeliest token ids under the first model so far: ids and both logits, [C, K]; copies, not views."""
    sft_CK, ids_CK = pair[0].topk(min(k, pair[0].shape[1]), dim=1)
    found = ids_CK + first_id, sft_CK, pair[1].gather(1, ids_CK)
    columns = [found] if best is None else [best, found]
    ids, sft, reference = (torch.cat(parts, dim=1) for parts in zip(*columns, strict=True))
    order_CK = sft.topk(min(k, sft.shape[1]), dim=1).indices
    ids, sft, reference = (column.gather(1, order_CK) for column in (ids, sft, reference))
    return ids, sft, reference


def _expected(weights_CW: Tensor, values_CW: Tensor) -> Tensor:
    """Sums of weight times value, [C]. An id of weight 0 adds nothing, whatever its value; a NaN stays one."""
    # 0 * inf is NaN, and an id that both models rule out has weight 0 and value -inf - -inf: hence `where`.
    return torch.where(weights_CW == 0, 0.0, weights_CW * values_CW).sum(dim=1)
