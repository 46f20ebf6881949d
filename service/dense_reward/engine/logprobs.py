"""THE token log-prob function: two models' head inputs -> log-probs, kl, entropy and alternatives, in one pass.

The output layers run on chunks of rows and tiles of the vocabulary, both models tile by tile, so that no logits outlive
their tile and on a CPU they are reduced while they lie in its cache. Softmaxes are kept as running maxima and sums, at
least in float32; what is left of them, a few numbers a row, is put together in float64.

R rows that predict something, V words, J named words (targets and candidates, each of one row), C rows of a chunk, W
words of a tile, K alternatives, X whatever a model's head takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dense_reward.engine.base import IdArray, Wants

Index = NDArray[np.int64]


NOTHING_MORE = Wants()


class Head(Protocol):
    """A model's output layer with all that the model does to its result."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def tiled(self) -> bool:
        """Whether a few words cost less than all of them."""
        ...

    def logits(self, rows_CX: Tensor, words: slice) -> Tensor:
        """The model's own logits of some words, [C, W]."""
        ...


@dataclass(frozen=True, slots=True)
class Side:
    """One model's share: the inputs of its output layer at the rows that predict, and that layer."""

    rows_RX: Tensor
    head: Head


@dataclass(frozen=True, slots=True)
class Tiling:
    """How much is computed at once. On a CPU the logits of both models then stay in its cache."""

    rows: int
    words: int


CPU_TILING = Tiling(1024, 2048)
CUDA_TILING = Tiling(4096, 16_384)


@dataclass(frozen=True, slots=True)
class Named:
    """Words whose log-probs are wanted, with their rows. Lies on the host, so that a device is never waited for."""

    row_J: Index
    id_J: IdArray


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Log-probs of the named words, and of each row what was asked for, in nats. On the device of the rows."""

    sft_logprob_J: Tensor
    reference_logprob_J: Tensor
    kl_R: Tensor | None
    entropy_R: Tensor | None
    top_ids_RK: Tensor | None
    top_sft_logprob_RK: Tensor | None
    top_reference_logprob_RK: Tensor | None


def score_rows(
    sft: Side, reference: Side, named: Named, wants: Wants = NOTHING_MORE, *, tiling: Tiling | None = None
) -> ScoredRows:
    """Log-probs of the named words under both models, and what else `wants` asks of every row.

    Both sides lie on one device, and their heads know the same words. kl is summed over all of them; it cannot be
    negative, so the rounding of nearly identical distributions is clamped at 0. Nothing is computed that was not asked.
    """
    tiling = _tiling(sft, reference, tiling)
    words = _Words(named, tiling, sft.rows_RX.device)
    chunks = []
    for part in _parts(len(sft.rows_RX), tiling.rows):
        chunk = _Chunk(wants)
        for tile in _parts(sft.head.vocabulary, tiling.words):
            pair = _logits(sft, part, tile), _logits(reference, part, tile)
            words.pick(pair, part, tile)
            chunk.add(*pair, tile.start)
        chunks.append((*chunk.log_totals(), *chunk.quantities()))
    sft_R, reference_R, *quantities = zip(*chunks, strict=True)
    return ScoredRows(*words.logprobs(torch.cat(sft_R), torch.cat(reference_R)), *map(_joined, quantities))


def _logits(side: Side, part: slice, words: slice) -> Tensor:
    """A tile of one model's logits that may be overwritten, at least in float32."""
    logits_CW = side.head.logits(side.rows_RX[part], words)
    return logits_CW.to(torch.promote_types(logits_CW.dtype, torch.float32))


def _tiling(sft: Side, reference: Side, asked: Tiling | None) -> Tiling:
    """As asked, or the device's own; as many logits at once, but of all words, where a head cannot be tiled."""
    tiling = asked or (CPU_TILING if sft.rows_RX.device.type == "cpu" else CUDA_TILING)
    if sft.head.tiled and reference.head.tiled:
        return tiling
    vocabulary = sft.head.vocabulary
    return Tiling(max(1, tiling.rows * tiling.words // vocabulary), vocabulary)


def _parts(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`; one empty slice for nothing, so that dtypes survive."""
    return (slice(start, min(start + size, count)) for start in range(0, max(count, 1), size))


def _joined(column: Sequence[Tensor | None]) -> Tensor | None:
    parts = [part for part in column if part is not None]
    return torch.cat(parts) if parts else None


class _Softmax:
    """log sum exp over the tiles so far, [C]: the largest logit, and the sum of exp(logit - largest)."""

    def __init__(self) -> None:
        self._largest_C = torch.tensor(torch.finfo(torch.float32).min)
        self.total_C = torch.zeros(())

    def add(self, logits_CW: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """Take in a tile: its exp(logit - largest), [C, W], and by what the sums of earlier tiles shrink, [C].

        Unless `keep`, the logits are overwritten.
        """
        largest_C = logits_CW.amax(dim=1).clamp_min(torch.finfo(torch.float32).min)
        if self.total_C.ndim:
            largest_C = torch.maximum(self._largest_C, largest_C)
        else:
            self._largest_C, self.total_C = largest_C, torch.zeros_like(largest_C)
        shrink_C = (self._largest_C - largest_C).exp_()
        weights_CW = (logits_CW - largest_C[:, None] if keep else logits_CW.sub_(largest_C[:, None])).exp_()
        self.total_C = self.total_C * shrink_C + weights_CW.sum(dim=1)
        self._largest_C = largest_C
        return weights_CW, shrink_C

    def log_total_C(self) -> Tensor:  # noqa: N802 - names carry shapes
        return self._largest_C.double() + self.total_C.double().log()


class _Chunk:
    """What is known of C rows while the tiles of their logits go by."""

    def __init__(self, wants: Wants) -> None:
        self.sft, self.reference = _Softmax(), _Softmax()
        self._wants = wants
        self._log_ratio_C: Tensor | float = 0.0  # sum of exp(sft logit - largest) (sft logit - reference logit)
        self._sft_logit_C: Tensor | float = 0.0  # sum of exp(sft logit - largest) sft logit
        self._top: tuple[Tensor, Tensor, Tensor] | None = None  # ids, sft logits, reference logits, [C, K]

    def add(self, sft_CW: Tensor, reference_CW: Tensor, first_word: int) -> None:
        """Take in a tile of both models' logits, which are lost after it."""
        if self._wants.top_k:
            self._top = _top(self._top, (sft_CW, reference_CW), first_word, self._wants.top_k)
        weights_CW, shrink_C = self.sft.add(sft_CW, keep=self._wants.kl or self._wants.entropy)
        if self._wants.entropy:
            self._sft_logit_C = self._sft_logit_C * shrink_C + _expected(weights_CW, sft_CW)
        if self._wants.kl:
            log_ratio_CW = sft_CW.sub_(reference_CW)
            self._log_ratio_C = self._log_ratio_C * shrink_C + _expected(weights_CW, log_ratio_CW)
        self.reference.add(reference_CW, keep=False)

    def log_totals(self) -> tuple[Tensor, Tensor]:
        """log sum exp of both models' logits, float64 [C]."""
        return self.sft.log_total_C(), self.reference.log_total_C()

    def quantities(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """kl, entropy, and of the alternatives ids and both log-probs; None for what was not asked for."""
        (sft_C, reference_C), total_C, dtype = self.log_totals(), self.sft.total_C, self.sft.total_C.dtype
        kl = entropy = None
        if self._wants.kl:
            kl = (self._log_ratio_C / total_C.double() - (sft_C - reference_C)).clamp_min(0.0).to(dtype)
        if self._wants.entropy:
            entropy = (sft_C - self._sft_logit_C / total_C.double()).to(dtype)
        if self._top is None:
            return kl, entropy, None, None, None
        ids, sft, reference = self._top
        return kl, entropy, ids, (sft - sft_C[:, None]).to(dtype), (reference - reference_C[:, None]).to(dtype)


class _Words:
    """The named words: their logits are picked from the tiles that go by, and become log-probs in the end.

    Sorted by chunk and word, so that those of a tile stand together, and no device is asked where they are.
    """

    def __init__(self, named: Named, tiling: Tiling, device: torch.device) -> None:
        chunk_J = named.row_J // tiling.rows
        self._order_J = np.lexsort((named.id_J, chunk_J))
        self._place_J = (chunk_J * np.int64(1 << 32) + named.id_J)[self._order_J]
        self._row_J = torch.from_numpy(named.row_J[self._order_J]).to(device)
        self._word_J = torch.from_numpy(named.id_J[self._order_J].astype(np.int64) % tiling.words).to(device)
        self._chunk_rows = tiling.rows
        self._logits_2J: Tensor | None = None

    def pick(self, pair: tuple[Tensor, Tensor], part: slice, tile: slice) -> None:
        """Remember the logits of the words that are in this tile."""
        if self._logits_2J is None:
            self._logits_2J = torch.empty((2, len(self._row_J)), dtype=pair[0].dtype, device=pair[0].device)
        chunk = part.start // self._chunk_rows * (1 << 32)
        start, stop = np.searchsorted(self._place_J, [chunk + tile.start, chunk + tile.stop])
        index = self._row_J[start:stop] - part.start, self._word_J[start:stop]
        for picked_J, logits_CW in zip(self._logits_2J, pair, strict=True):
            picked_J[start:stop] = logits_CW[index]

    def logprobs(self, sft_R: Tensor, reference_R: Tensor) -> tuple[Tensor, Tensor]:
        """Both models' log-probs in the order in which the words were named, given their rows' log sum exp."""
        if self._logits_2J is None:
            raise RuntimeError("no tile went by")
        back_J = torch.from_numpy(np.argsort(self._order_J)).to(self._row_J.device)
        sft_J, reference_J = (
            (picked_J - log_total_R[self._row_J]).to(picked_J.dtype)[back_J]
            for picked_J, log_total_R in zip(self._logits_2J, (sft_R, reference_R), strict=True)
        )
        return sft_J, reference_J


def _top(
    best: tuple[Tensor, Tensor, Tensor] | None, pair: tuple[Tensor, Tensor], first_word: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest words under the first model so far: ids and both logits, [C, K]."""
    sft_CK, ids_CK = pair[0].topk(min(k, pair[0].shape[1]), dim=1)
    found = ids_CK + first_word, sft_CK, pair[1].gather(1, ids_CK)
    columns = [found] if best is None else [best, found]
    ids, sft, reference = (torch.cat(parts, dim=1) for parts in zip(*columns, strict=True))
    order_CK = sft.topk(min(k, sft.shape[1]), dim=1).indices
    ids, sft, reference = (column.gather(1, order_CK) for column in (ids, sft, reference))
    return ids, sft, reference


def _expected(weights_CW: Tensor, values_CW: Tensor) -> Tensor:
    """Sums of weight times value, [C]; a word of weight 0 adds nothing, whatever its value, and a NaN stays one."""
    return torch.where(weights_CW == 0, 0.0, weights_CW * values_CW).sum(dim=1)
