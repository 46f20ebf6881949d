"""Running sums over the vocabulary tiles of a chunk of rows, in plain torch: log sum exp, expectations, top ids.

The tiles come one after another, of all models at once. A softmax is kept as a running maximum and a running sum.

Shapes: C rows of a chunk, W token ids of a vocabulary tile, K alternatives, M models.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dense_reward.records import Wants

Pair = tuple[int, int]
"""Indices of the sft model and of the reference among the models."""
Quantities = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""kl, entropy, varentropy, then ids and both log-probs of the alternatives; None for what is not requested."""
Top = tuple[Tensor, Tensor, Tensor]
"""The likeliest token ids so far: ids, sft logits, reference logits, [C, K] each."""


class RowSums(Protocol):
    """The running sums of C rows."""

    def add(self, logits: Sequence[Tensor], first_id: int) -> None:
        """Add a tile of every model's logits, [C, W] each, which may be overwritten."""
        ...

    def log_totals(self) -> list[Tensor]:
        """log sum exp of every model's logits, float64 [C]."""
        ...

    def quantities(self, at: int) -> Quantities:
        """Of the pair with this index, [C] and [C, K]."""
        ...


class _Softmax:
    """log sum exp over the tiles so far, [C].

    Invariant after every tile: `_largest_C` is the largest logit so far, and `total_C` the sum of exp(logit - largest)
    over all tiles so far. A tile that raises the maximum shrinks the earlier sum by exp(old - new largest), so no
    exponent is ever positive and nothing overflows. Of the last tile, `moved_C` is old - new largest, and `earlier_C`
    the sum before it, not yet shrunk.
    """

    def __init__(self) -> None:
        # Finite rather than -inf: -inf - -inf is NaN, and a tile may hold only ids that the model rules out.
        self._largest_C = torch.tensor(torch.finfo(torch.float32).min)
        self.total_C = torch.zeros(())  # without a dimension until the first tile
        self.moved_C, self.earlier_C = self._largest_C, self.total_C

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
        self.moved_C, self.earlier_C = self._largest_C - largest_C, self.total_C
        shrink_C = self.moved_C.exp()
        weights_CW = (logits_CW - largest_C[:, None] if keep else logits_CW.sub_(largest_C[:, None])).exp_()
        self.total_C = self.total_C * shrink_C + weights_CW.sum(dim=1)
        self._largest_C = largest_C
        return weights_CW, shrink_C

    def below_largest(self, logits_CW: Tensor) -> Tensor:
        """Logits of the last tile less the largest logit so far, [C, W]."""
        return logits_CW - self._largest_C[:, None]

    def log_total_C(self) -> Tensor:  # noqa: N802 - names carry shapes
        """log sum exp, float64: a log-prob is a small difference between a logit and this, which may both be large."""
        return self._largest_C.double() + self.total_C.double().log()


class _Moments:
    """Weighted sums of the first and second power of (logit - largest), [C], of one softmax.

    Powers of the logit itself would cancel where one id has nearly all probability: its logit may be large, but its
    distance d to the largest is 0. If the largest changes by -m, an earlier d becomes d + m. So the sums of w d and of
    w d^2 become those of w (d + m) and of w (d^2 + 2 m d + m^2), and shrink with the weights.
    """

    def __init__(self) -> None:
        self._first_C: Tensor | float = 0.0
        self._second_C: Tensor | float = 0.0

    def add(self, softmax: _Softmax, weights_CW: Tensor, shrink_C: Tensor, logits_CW: Tensor) -> None:
        """Add the tile that the softmax has just added, with the weights and the factor that it returned."""
        # Where nothing is left of the earlier sums, m may be as low as float32 goes, and m^2 infinite.
        moved_C = torch.where(shrink_C == 0, 0.0, softmax.moved_C)
        moved_first_C = self._first_C + moved_C * softmax.earlier_C
        moved_second_C = self._second_C + moved_C * (self._first_C + moved_first_C)
        below_CW = torch.where(weights_CW == 0, 0.0, softmax.below_largest(logits_CW))  # an id of weight 0 adds nothing
        weighted_CW = weights_CW * below_CW
        self._first_C = shrink_C * moved_first_C + weighted_CW.sum(dim=1)
        self._second_C = shrink_C * moved_second_C + weighted_CW.mul_(below_CW).sum(dim=1)

    def variance(self, total_C: Tensor) -> Tensor:
        """Of (logit - largest) under the softmax with this total, which is the variance of the log-prob; [C]."""
        return variance(total_C.double(), *(torch.as_tensor(sums) for sums in (self._first_C, self._second_C)))


def variance(total_C: Tensor, first_C: Tensor, second_C: Tensor) -> Tensor:
    """From the sums of w, w d and w d^2, in float64: rounding can make it negative, so it is clamped at 0."""
    mean_C = first_C.double() / total_C.double()
    return (second_C.double() / total_C.double() - mean_C.square()).clamp_min(0.0)


class TorchSums:
    """The running sums of C rows, over the tiles of their logits so far.

    kl, entropy and varentropy are expectations under the sft model. Their sums carry the same weights exp(sft logit -
    largest) as its softmax, and shrink with it; `quantities` divides them by its total.
    """

    def __init__(self, models: int, pairs: Sequence[Pair], wants: Wants) -> None:
        self._softmaxes = [_Softmax() for _ in range(models)]
        self._pairs = pairs
        self._wants = wants
        self._sft_models = sorted({sft for sft, _ in pairs})
        # Weighted sums: of (sft logit - reference logit) for each pair, of the sft logit for each model.
        self._log_ratio_C: list[Tensor | float] = [0.0] * len(pairs)
        self._sft_logit_C: list[Tensor | float] = [0.0] * models
        self._moments = [_Moments() for _ in range(models)]
        self._top: list[Top | None] = [None] * len(pairs)

    def add(self, logits: Sequence[Tensor], first_id: int) -> None:
        """Add a tile of every model's logits, [C, W] each, which this overwrites.

        The order of the steps matters: each overwrites only logits that no later step reads.
        """
        if self._wants.top_k:
            for at, (sft, reference) in enumerate(self._pairs):
                two = logits[sft], logits[reference]
                self._top[at] = likeliest(self._top[at], two, first_id, self._wants.top_k)
        weighted = {}
        for model in self._sft_models:
            # Expectations need the logits and their weights at the same time; else the weights overwrite the logits.
            keep = self._wants.kl or self._wants.entropy or self._wants.varentropy
            weighted[model] = weights_CW, shrink_C = self._softmaxes[model].add(logits[model], keep=keep)
            if self._wants.entropy:
                self._sft_logit_C[model] = self._sft_logit_C[model] * shrink_C + _expected(weights_CW, logits[model])
            if self._wants.varentropy:
                self._moments[model].add(self._softmaxes[model], weights_CW, shrink_C, logits[model])
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

    def quantities(self, at: int) -> Quantities:
        model, reference = self._pairs[at]
        total_C = self._softmaxes[model].total_C
        sft_C, reference_C = self._softmaxes[model].log_total_C(), self._softmaxes[reference].log_total_C()
        kl = entropy = varentropy = None
        if self._wants.kl:
            # E[log p - log q] = E[sft logit - reference logit] - (sft log sum exp - reference log sum exp)
            kl = self._log_ratio_C[at] / total_C.double() - (sft_C - reference_C)
            kl = kl.clamp_min(0.0).to(total_C.dtype)
        if self._wants.entropy:
            # -E[log p] = sft log sum exp - E[sft logit]
            entropy = (sft_C - self._sft_logit_C[model] / total_C.double()).to(total_C.dtype)
        if self._wants.varentropy:
            varentropy = self._moments[model].variance(total_C).to(total_C.dtype)
        top = self._top[at]
        if top is None:
            return kl, entropy, varentropy, None, None, None
        ids, sft, found = top
        dtype = total_C.dtype
        return kl, entropy, varentropy, ids, (sft - sft_C[:, None]).to(dtype), (found - reference_C[:, None]).to(dtype)


def likeliest(best: Top | None, pair: tuple[Tensor, Tensor], first_id: int, k: int) -> Top:
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
