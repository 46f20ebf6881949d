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

from dense_reward.records import IdArray, Wants

Index = NDArray[np.int64]
Pair = tuple[int, int]
"""Of the sides, the sft model's and the reference's."""
_Top = tuple[Tensor, Tensor, Tensor]
"""The likeliest words so far: ids, sft logits, reference logits, [C, K]."""

NOTHING_MORE = Wants()


class Head(Protocol):
    """A model's output layer with all that the model does to its result."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def tiled(self) -> bool:
        """Whether a few words cost less than all of them."""
        ...

    def logits(self, rows_CX: Tensor, words: slice) -> Tensor:
        """The model's own logits of some words, [C, W]."""
        ...


@dataclass(frozen=True, slots=True)
class ModelRows:
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
class WantedIds:
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
    sft: ModelRows, reference: ModelRows, named: WantedIds, wants: Wants = NOTHING_MORE, *, tiling: Tiling | None = None
) -> ScoredRows:
    """Log-probs of the named words under both models, and what else `wants` asks of every row.

    Both sides lie on one device, and their heads know the same words. kl is summed over all of them; it cannot be
    negative, so the rounding of nearly identical distributions is clamped at 0. Nothing is computed that was not asked.
    """
    return score_pairs((sft, reference), ((0, 1),), named, wants, tiling=tiling)[0]


def score_pairs(
    sides: Sequence[ModelRows],
    pairs: Sequence[Pair],
    named: WantedIds,
    wants: Wants = NOTHING_MORE,
    *,
    tiling: Tiling | None = None,
) -> list[ScoredRows]:
    """The same for several pairs of models that saw the same rows; a model's logits are made once for all its pairs."""
    tiling = _tiling(sides, tiling)
    words = _Words(named, tiling, sides[0].rows_RX.device)
    chunks = []
    for part in _parts(len(sides[0].rows_RX), tiling.rows):
        chunk = _Chunk(len(sides), pairs, wants)
        for tile in _parts(sides[0].head.vocab_size, tiling.words):
            logits = [_logits(side, part, tile) for side in sides]
            words.pick(logits, part, tile)
            chunk.add(logits, tile.start)
        chunks.append(chunk)
    totals = zip(*(chunk.log_totals() for chunk in chunks), strict=True)
    logprobs = words.logprobs([torch.cat(total_C) for total_C in totals])
    found = []
    for at, (sft, reference) in enumerate(pairs):
        quantities = zip(*(chunk.quantities(at) for chunk in chunks), strict=True)
        found.append(ScoredRows(logprobs[sft], logprobs[reference], *map(_joined, quantities)))
    return found


def _logits(side: ModelRows, part: slice, words: slice) -> Tensor:
    """A tile of one model's logits that may be overwritten, at least in float32."""
    logits_CW = side.head.logits(side.rows_RX[part], words)
    return logits_CW.to(torch.promote_types(logits_CW.dtype, torch.float32))


def _tiling(sides: Sequence[ModelRows], asked: Tiling | None) -> Tiling:
    """As asked, or the device's own; as many logits at once, but of all words, where a head cannot be tiled."""
    tiling = asked or (CPU_TILING if sides[0].rows_RX.device.type == "cpu" else CUDA_TILING)
    if all(side.head.tiled for side in sides):
        return tiling
    vocab_size = sides[0].head.vocab_size
    return Tiling(max(1, tiling.rows * tiling.words // vocab_size), vocab_size)


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

    def __init__(self, sides: int, pairs: Sequence[Pair], wants: Wants) -> None:
        self._softmaxes = [_Softmax() for _ in range(sides)]
        self._pairs = pairs
        self._wants = wants
        self._sft_sides = sorted({sft for sft, _ in pairs})
        # sums of exp(sft logit - largest), times (sft logit - reference logit) or times the sft logit
        self._log_ratio_C: list[Tensor | float] = [0.0] * len(pairs)
        self._sft_logit_C: list[Tensor | float] = [0.0] * sides
        self._top: list[_Top | None] = [None] * len(pairs)

    def add(self, logits: Sequence[Tensor], first_word: int) -> None:
        """Take in a tile of every model's logits, [C, W] each, which are lost after it."""
        if self._wants.top_k:
            for at, (sft, reference) in enumerate(self._pairs):
                two = logits[sft], logits[reference]
                self._top[at] = _top(self._top[at], two, first_word, self._wants.top_k)
        weighed = {}
        for side in self._sft_sides:
            keep = self._wants.kl or self._wants.entropy
            weighed[side] = weights_CW, shrink_C = self._softmaxes[side].add(logits[side], keep=keep)
            if self._wants.entropy:
                self._sft_logit_C[side] = self._sft_logit_C[side] * shrink_C + _expected(weights_CW, logits[side])
        if self._wants.kl:
            for at, (sft, _) in enumerate(self._pairs):
                weights_CW, shrink_C = weighed[sft]
                log_ratio_CW = self._log_ratios(logits, at)
                self._log_ratio_C[at] = self._log_ratio_C[at] * shrink_C + _expected(weights_CW, log_ratio_CW)
        for side in set(range(len(logits))).difference(self._sft_sides):
            self._softmaxes[side].add(logits[side], keep=False)

    def _log_ratios(self, logits: Sequence[Tensor], at: int) -> Tensor:
        """Of a pair, up to a constant a row; in the place of the sft logits, where nothing needs them after that."""
        sft, reference = self._pairs[at]
        needed = any(sft in pair for pair in self._pairs[at + 1 :])
        return logits[sft] - logits[reference] if needed else logits[sft].sub_(logits[reference])

    def log_totals(self) -> list[Tensor]:
        """log sum exp of every model's logits, float64 [C]."""
        return [softmax.log_total_C() for softmax in self._softmaxes]

    def quantities(self, at: int) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Of a pair kl, entropy, and of the alternatives ids and both log-probs; None for what was not asked for."""
        side, reference = self._pairs[at]
        total_C = self._softmaxes[side].total_C
        sft_C, reference_C = self._softmaxes[side].log_total_C(), self._softmaxes[reference].log_total_C()
        kl = entropy = None
        if self._wants.kl:
            kl = self._log_ratio_C[at] / total_C.double() - (sft_C - reference_C)
            kl = kl.clamp_min(0.0).to(total_C.dtype)
        if self._wants.entropy:
            entropy = (sft_C - self._sft_logit_C[side] / total_C.double()).to(total_C.dtype)
        top = self._top[at]
        if top is None:
            return kl, entropy, None, None, None
        ids, sft, found = top
        dtype = total_C.dtype
        return kl, entropy, ids, (sft - sft_C[:, None]).to(dtype), (found - reference_C[:, None]).to(dtype)


class _Words:
    """The named words: their logits are picked from the tiles that go by, and become log-probs in the end.

    Sorted by chunk and word, so that those of a tile stand together, and no device is asked where they are.
    """

    def __init__(self, named: WantedIds, tiling: Tiling, device: torch.device) -> None:
        chunk_J = named.row_J // tiling.rows
        self._order_J = np.lexsort((named.id_J, chunk_J))
        self._place_J = (chunk_J * np.int64(1 << 32) + named.id_J)[self._order_J]
        self._row_J = torch.from_numpy(named.row_J[self._order_J]).to(device)
        self._word_J = torch.from_numpy(named.id_J[self._order_J].astype(np.int64) % tiling.words).to(device)
        self._chunk_rows = tiling.rows
        self._logits_MJ: Tensor | None = None

    def pick(self, logits: Sequence[Tensor], part: slice, tile: slice) -> None:
        """Remember the logits of the words that are in this tile, of each of M models."""
        if self._logits_MJ is None:
            shape = len(logits), len(self._row_J)
            self._logits_MJ = torch.empty(shape, dtype=logits[0].dtype, device=logits[0].device)
        chunk = part.start // self._chunk_rows * (1 << 32)
        start, stop = np.searchsorted(self._place_J, [chunk + tile.start, chunk + tile.stop])
        index = self._row_J[start:stop] - part.start, self._word_J[start:stop]
        for picked_J, logits_CW in zip(self._logits_MJ, logits, strict=True):
            picked_J[start:stop] = logits_CW[index]

    def logprobs(self, totals: Sequence[Tensor]) -> list[Tensor]:
        """Each model's log-probs in the order in which the words were named, given its rows' log sum exp, [R]."""
        if self._logits_MJ is None:
            raise RuntimeError("no tile went by")
        back_J = torch.from_numpy(np.argsort(self._order_J)).to(self._row_J.device)
        return [
            (picked_J - log_total_R[self._row_J]).to(picked_J.dtype)[back_J]
            for picked_J, log_total_R in zip(self._logits_MJ, totals, strict=True)
        ]


def _top(best: _Top | None, pair: tuple[Tensor, Tensor], first_word: int, k: int) -> _Top:
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
