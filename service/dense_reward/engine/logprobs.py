"""THE token log-prob function: two models' head inputs -> log-probs, kl, entropy, candidates and alternatives.

Chunked over positions, so that no [tokens, vocabulary] tensor outlives its chunk; reductions in float32 (float64 for
float64 models). N scored positions, V vocabulary, K alternatives to each, M candidates of all positions together, X
whatever a model's head takes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dense_reward.engine.base import Wants

Head = Callable[[Tensor], Tensor]
Named = tuple[Tensor, Tensor]
"""Row within a chunk and id of each candidate."""


@dataclass(frozen=True, slots=True)
class Side:
    """One model's share: the inputs of its output layer at the scored positions, and that layer."""

    rows_NX: Tensor
    head: Head


@dataclass(frozen=True, slots=True)
class Candidates:
    """Ids whose reward is asked for, one position's after another's: `counts_N` tells how many each has, on the host.

    Flat, so that a position with many costs its own alone and not a rectangle of that width.
    """

    ids_M: Tensor
    counts_N: Tensor


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """The quantities of N positions; those that were not asked for are None."""

    sft_logprob_N: Tensor
    reference_logprob_N: Tensor
    kl_N: Tensor | None
    entropy_N: Tensor | None
    candidate_reward_M: Tensor | None
    top_ids_NK: Tensor | None
    top_sft_logprob_NK: Tensor | None
    top_reference_logprob_NK: Tensor | None


def score_rows(
    sft: Side,
    reference: Side,
    targets_N: Tensor,
    wants: Wants,
    candidates: Candidates | None = None,
    *,
    chunk_rows: int = 256,
) -> ScoredRows:
    """Log-probs of `targets_N` under both models and what else `wants` names, in nats, [N], [N, K] or [M].

    kl is summed over the whole vocabulary. It cannot be negative, so the rounding of identical distributions
    (about -1e-8) is clamped at 0.
    """
    parts = list(_parts(len(targets_N), chunk_rows))
    named = [None] * len(parts) if candidates is None else _named(candidates, parts)
    chunks = [
        _score_chunk(
            _logprobs(sft.head(sft.rows_NX[part])),
            _logprobs(reference.head(reference.rows_NX[part])),
            targets_N[part],
            wants,
            of_part,
        )
        for part, of_part in zip(parts, named, strict=True)
    ]
    columns = zip(*chunks, strict=True)
    return ScoredRows(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _score_chunk(
    sft_CV: Tensor, reference_CV: Tensor, targets_C: Tensor, wants: Wants, named: Named | None
) -> tuple[Tensor | None, ...]:
    """The fields of ScoredRows, in order, for one chunk of log-probs."""
    index_C1 = targets_C[:, None]
    kl = entropy = candidates = top_ids = top_sft = top_reference = None
    if wants.kl or wants.entropy:
        probability_CV = sft_CV.exp()
    if wants.kl:
        kl = _expectation(probability_CV, sft_CV - reference_CV).clamp_min(0.0)
    if wants.entropy:
        entropy = -_expectation(probability_CV, sft_CV)
    if named is not None:
        candidates = sft_CV[named] - reference_CV[named]
    if wants.top_k:
        top_sft, top_ids = sft_CV.topk(wants.top_k, dim=1)
        top_reference = reference_CV.gather(1, top_ids)
    logprobs = (sft_CV.gather(1, index_C1)[:, 0], reference_CV.gather(1, index_C1)[:, 0])
    return (*logprobs, kl, entropy, candidates, top_ids, top_sft, top_reference)


def _named(candidates: Candidates, parts: Sequence[slice]) -> list[Named | None]:
    """The candidates of each part of the positions."""
    counts = [candidates.counts_N[part] for part in parts]
    ids = torch.split(candidates.ids_M, [int(count.sum()) for count in counts])
    return [
        (torch.arange(len(count)).repeat_interleave(count).to(ids_m.device), ids_m.long())
        for count, ids_m in zip(counts, ids, strict=True)
    ]


def _logprobs(logits_CV: Tensor) -> Tensor:
    """Log-softmax over the vocabulary, at least in float32."""
    accumulate = torch.promote_types(logits_CV.dtype, torch.float32)
    return torch.log_softmax(logits_CV, dim=-1, dtype=accumulate)


def _expectation(probability_CV: Tensor, value_CV: Tensor) -> Tensor:
    """sum_a p(a) v(a), [C]; a token of probability 0 adds nothing, whatever its value, and a NaN stays one."""
    return torch.where(probability_CV == 0, 0.0, probability_CV * value_CV).sum(dim=-1)


def _parts(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`; one empty slice for nothing, so that dtypes survive."""
    return (slice(start, start + size) for start in range(0, max(count, 1), size))
