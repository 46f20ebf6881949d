"""The running sums of row_sums.py in one kernel, which reads each tile of logits once and writes none.

On a GPU it is one of Triton, on a CPU one of compiled.py.

In plain torch a tile is read and written ten times (log-probs) to fifteen times (kl and entropy).

Shapes: C rows of a chunk, W token ids of a vocabulary tile, P pairs.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from dense_reward.engines.kernels import compiled
from dense_reward.engines.kernels.row_sums import Pair, Quantities, Top, likeliest, variance
from dense_reward.records import Wants

try:
    import triton
    from triton import language as tl
except ImportError as error:
    _MISSING: str | None = f"{error.name} is not installed"
else:
    _MISSING = None

_BLOCK = 4096  # token ids that a program holds in registers at once
_WARPS = 8
_SUMS, _WITH_MOMENTS = 6, 8
"""Numbers kept for each row: the largest logit and the sum of exp(logit - largest) of the sft model, then of the
reference; and the sums, with the sft model's weights, of its logit and of the difference of the two logits; with
varentropy also of the first and second power of (logit - largest)."""

if _MISSING is None:
    _LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

    @triton.jit(do_not_specialize=["C", "W"])  # type: ignore[untyped-decorator]
    def _absorb(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0917 - Triton has its own types
        sft,  # noqa: ANN001
        reference,  # noqa: ANN001
        sums,  # noqa: ANN001
        C,  # noqa: ANN001
        W,  # noqa: ANN001
        sft_stride,  # noqa: ANN001
        reference_stride,  # noqa: ANN001
        EXPECTATIONS: tl.constexpr,
        MOMENTS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Add a tile of a pair to the sums, [_SUMS or _WITH_MOMENTS, C]; one program for each row."""
        row = tl.program_id(0).to(tl.int64)
        at = sums + row
        sft_most, sft_total = tl.load(at), tl.load(at + C)
        reference_most, reference_total = tl.load(at + 2 * C), tl.load(at + 3 * C)
        sft_logit, log_ratio = tl.load(at + 4 * C), tl.load(at + 5 * C)
        if MOMENTS:
            first, second = tl.load(at + 6 * C), tl.load(at + 7 * C)
        for start in range(0, W, BLOCK):
            word = start + tl.arange(0, BLOCK)
            inside = word < W
            z = tl.load(sft + row * sft_stride + word, mask=inside, other=0.0).to(tl.float32)
            z = tl.where(inside, z, _LOWEST)
            y = tl.load(reference + row * reference_stride + word, mask=inside, other=0.0).to(tl.float32)
            y = tl.where(inside, y, _LOWEST)
            most = tl.maximum(sft_most, tl.max(z, axis=0))
            shrink = tl.exp(sft_most - most)
            weight = tl.where(inside, tl.exp(z - most), 0.0)
            if MOMENTS:  # before sft_total changes; row_sums._Moments has the formulas
                moved = tl.where(shrink == 0.0, 0.0, sft_most - most)
                below = tl.where(weight == 0.0, 0.0, z - most)
                second += moved * (2 * first + moved * sft_total)
                second = second * shrink + tl.sum(weight * below * below, axis=0)
                first = (first + moved * sft_total) * shrink + tl.sum(weight * below, axis=0)
            sft_total = sft_total * shrink + tl.sum(weight, axis=0)
            if EXPECTATIONS:  # an id of weight 0 adds nothing, whatever its logits
                sft_logit = sft_logit * shrink + tl.sum(tl.where(weight == 0.0, 0.0, weight * z), axis=0)
                log_ratio = log_ratio * shrink + tl.sum(tl.where(weight == 0.0, 0.0, weight * (z - y)), axis=0)
            sft_most = most
            most = tl.maximum(reference_most, tl.max(y, axis=0))
            weight = tl.where(inside, tl.exp(y - most), 0.0)
            reference_total = reference_total * tl.exp(reference_most - most) + tl.sum(weight, axis=0)
            reference_most = most
        tl.store(at, sft_most)
        tl.store(at + C, sft_total)
        tl.store(at + 2 * C, reference_most)
        tl.store(at + 3 * C, reference_total)
        tl.store(at + 4 * C, sft_logit)
        tl.store(at + 5 * C, log_ratio)
        if MOMENTS:
            tl.store(at + 6 * C, first)
            tl.store(at + 7 * C, second)


class FusedSums:
    """Running sums of C rows: the same as TorchSums within float32 rounding. Overwrites no logits."""

    def __init__(self, models: int, pairs: Sequence[Pair], wants: Wants) -> None:
        self._models = models
        self._pairs = pairs
        self._wants = wants
        self._sums_P: list[Tensor] = []
        self._top: list[Top | None] = [None] * len(pairs)

    def add(self, logits: Sequence[Tensor], first_id: int) -> None:
        """Add a tile of every model's logits, [C, W] each, in any dtype; rows must be dense."""
        rows, words = logits[0].shape
        if not self._sums_P:
            kept = _WITH_MOMENTS if self._wants.varentropy else _SUMS
            self._sums_P = [_no_sums(kept, rows, logits[0].device) for _ in self._pairs]
        for at, (sft, reference) in enumerate(self._pairs):
            two = logits[sft], logits[reference]
            if self._wants.top_k:
                self._top[at] = likeliest(self._top[at], two, first_id, self._wants.top_k)
            if not rows:
                continue
            if compiled.computes(logits[0].device):
                self._sums_P[at] = compiled.computed(self._function, *two, self._sums_P[at])
                continue
            # Triton launches on the current device, wherever its tensors are.
            with torch.cuda.device_of(logits[0]):  # type: ignore[no-untyped-call]
                _absorb[(rows,)](
                    *two,
                    self._sums_P[at],
                    rows,
                    words,
                    two[0].stride(0),
                    two[1].stride(0),
                    EXPECTATIONS=self._wants.kl or self._wants.entropy or self._wants.varentropy,
                    MOMENTS=self._wants.varentropy,
                    BLOCK=_BLOCK,
                    num_warps=_WARPS,
                )

    @property
    def _function(self) -> Callable[..., Tensor]:
        if self._wants.varentropy:
            return compiled.moments_of
        return compiled.expectations_of if self._wants.kl or self._wants.entropy else compiled.sums_of

    def log_totals(self) -> list[Tensor]:
        """log sum exp of every model's logits, float64 [C]."""
        found: dict[int, Tensor] = {}
        for (sft, reference), sums in zip(self._pairs, self._sums_P, strict=True):
            found[sft], found[reference] = _log_totals(sums.double())
        return [found[model] for model in range(self._models)]

    def quantities(self, at: int) -> Quantities:
        """Of the pair with this index: see row_sums.TorchSums, which has the formulas."""
        sums = self._sums_P[at].double()
        sft_C, reference_C = _log_totals(sums)
        kl = (sums[5] / sums[1] - (sft_C - reference_C)).clamp_min(0.0).float() if self._wants.kl else None
        entropy = (sft_C - sums[4] / sums[1]).float() if self._wants.entropy else None
        varentropy = variance(sums[1], sums[6], sums[7]).float() if self._wants.varentropy else None
        top = self._top[at]
        if top is None:
            return kl, entropy, varentropy, None, None, None
        ids, sft, reference = top
        return kl, entropy, varentropy, ids, (sft - sft_C[:, None]).float(), (reference - reference_C[:, None]).float()


def cannot_fuse(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there are no kernels for a device and a dtype; None if there are.

    Compiles this kernel for a GPU, so that no request waits; those of a CPU are compiled by `compiled.start`.
    """
    if device.type == "cpu":
        return None if compiled.is_started(dtype) else "they were not compiled"
    return _cannot_run(device)


@cache
def _cannot_run(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device."""
    if device.type != "cuda":
        return f"they run on GPUs, not on {device.type}"
    if _MISSING is not None:
        return _MISSING
    try:
        for wants in (Wants(), Wants(kl=True), Wants(varentropy=True)):
            for words in (2 * _BLOCK, 2 * _BLOCK - 1):  # Triton compiles a stride that is a multiple of 16 by itself
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    logits = torch.zeros(2, words, dtype=dtype, device=device)
                    FusedSums(2, ((0, 1),), wants).add((logits, logits), 0)
        torch.cuda.synchronize(device)
    except Exception as error:  # a compiler that is missing or fails raises anything; torch computes then
        return f"they do not compile ({str(error).strip().partition(chr(10))[0]}): install a C compiler"
    return None


def _no_sums(kept: int, rows: int, device: torch.device) -> Tensor:
    sums = torch.zeros(kept, rows, device=device)
    sums[0] = sums[2] = torch.finfo(torch.float32).min  # finite: -inf - -inf is NaN
    return sums


def _log_totals(sums: Tensor) -> tuple[Tensor, Tensor]:
    return sums[0] + sums[1].log(), sums[2] + sums[3].log()
