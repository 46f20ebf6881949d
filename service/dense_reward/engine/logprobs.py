"""THE token log-prob function: two models' head inputs -> log-probs, kl, entropy, candidates and alternatives.

Chunked over positions, so that no [tokens, vocabulary] tensor outlives its chunk; reductions in float32 (float64 for
float64 models). N scored positions, V vocabulary, K candidates, X whatever a model's head takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dense_reward.engine.base import Wants

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Side:
    """One model's share: the inputs of its output layer at the scored positions, and that layer."""

    rows_NX: Tensor
    head: Head


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """The quantities of N positions; those that were not asked for are None."""

    sft_logprob_N: Tensor
    reference_logprob_N: Tensor
    kl_N: Tensor | None
    entropy_N: Tensor | None
    candidate_reward_NK: Tensor | None
    top_ids_NK: Tensor | None
    top_sft_logprob_NK: Tensor | None
    top_reference_logprob_NK: Tensor | None


def score_rows(
    sft: Side,
    reference: Side,
    targets_N: Tensor,
    wants: Wants,
    candidates_NK: Tensor | None = None,
    *,
    chunk_rows: int = 256,
) -> ScoredRows:
    """Log-probs of `targets_N` under both models and what else `wants` names, in nats, [N] or [N, K].

    kl is summed over the whole vocabulary. It cannot be negative, so the rounding of identical distributions
    (about -1e-8) is clamped at 0.
    """
    chunks = [
        _score_chunk(
            _logprobs(sft.head(sft.rows_NX[part])),
            _logprobs(reference.head(reference.rows_NX[part])),
            targets_N[part],
            wants,
            None if candidates_NK is None else candidates_NK[part],
        )
        for part in _parts(len(targets_N), chunk_rows)
    ]
    columns = zip(*chunks, strict=True)
    return ScoredRows(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _score_chunk(
    sft_CV: Tensor, reference_CV: Tensor, targets_C: Tensor, wants: Wants, candidates_CK: Tensor | None
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
    if candidates_CK is not None:
        candidates = sft_CV.gather(1, candidates_CK) - reference_CV.gather(1, candidates_CK)
    if wants.top_k:
        top_sft, top_ids = sft_CV.topk(wants.top_k, dim=1)
        top_reference = reference_CV.gather(1, top_ids)
    logprobs = (sft_CV.gather(1, index_C1)[:, 0], reference_CV.gather(1, index_C1)[:, 0])
    return (*logprobs, kl, entropy, candidates, top_ids, top_sft, top_reference)


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
