"""What becomes of a batch's results: checked, then cut down to what each request asked for."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dense_reward.records import TokenScores, Trunk, Wants

Number = TypeVar("Number", np.float32, np.int32)


def check_shape(trunks: Sequence[Trunk], results: Sequence[Sequence[TokenScores]]) -> None:
    """Raises RuntimeError if an engine lost or added a branch or a token: scores would reach the wrong request."""
    expected, found = [len(trunk.branches) for trunk in trunks], [len(scores) for scores in results]
    if expected != found:
        raise RuntimeError(f"the engine returned scores of {found} branches instead of {expected}")
    for trunk, branches in zip(trunks, results, strict=True):
        tokens = [int(branch.scored_T.sum()) for branch in trunk.branches]
        answered = [scores.tokens for scores in branches]
        if tokens != answered:
            raise RuntimeError(f"the engine returned scores of {answered} tokens instead of {tokens}")


def wanted(scores: TokenScores, wants: Wants) -> TokenScores:
    """The scores without the quantities that only other requests wanted: an answer depends only on its own request."""
    k = wants.top_k
    return TokenScores(
        scores.sft_logprob_S,
        scores.reference_logprob_S,
        kl_S=scores.kl_S if wants.kl else None,
        entropy_S=scores.entropy_S if wants.entropy else None,
        varentropy_S=scores.varentropy_S if wants.varentropy else None,
        candidate_sft_logprob_SK=scores.candidate_sft_logprob_SK,
        candidate_reference_logprob_SK=scores.candidate_reference_logprob_SK,
        top_ids_SK=_first(scores.top_ids_SK, k),
        top_sft_logprob_SK=_first(scores.top_sft_logprob_SK, k),
        top_reference_logprob_SK=_first(scores.top_reference_logprob_SK, k),
        value_S=scores.value_S,
        teacher=scores.teacher,
    )


def _first(array_SK: NDArray[Number] | None, k: int) -> NDArray[Number] | None:
    return None if array_SK is None or k == 0 else np.ascontiguousarray(array_SK[:, :k])
