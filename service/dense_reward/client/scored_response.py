"""One response of an answer, with numpy arrays.

Shapes: T scored tokens of the response, K candidates, S segments.
"""

from dataclasses import dataclass

from dense_reward.client.errors import ItemError
from dense_reward.records import FloatArray, IdArray


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the `top_k` likeliest ids at a position under the SFT model, with its text."""

    id: int
    token: str
    sft_logprob: float
    reward: float


@dataclass(frozen=True, slots=True, eq=False)
class ScoredResponse:
    """One response with the requested arrays; the others are None.

    Arrays are [T], except offsets [T, 2] (code points of the text), candidate_reward and candidate_sft_logprob [T, K],
    and segments [S]. They are in nats; varentropy in nats squared.

    If `error` is set (only with on_error "per_item") the whole item failed: no response, no arrays, sum NaN.
    """

    item: int
    response: int | None
    length: int
    sum: float
    mean: float | None = None
    min: float | None = None
    token_ids: IdArray | None = None
    tokens: tuple[str, ...] | None = None
    offsets: IdArray | None = None
    text: str | None = None
    reward: FloatArray | None = None
    sft_logprob: FloatArray | None = None
    reference_logprob: FloatArray | None = None
    kl: FloatArray | None = None
    centred: FloatArray | None = None
    entropy: FloatArray | None = None
    varentropy: FloatArray | None = None
    return_to_go: FloatArray | None = None
    candidate_reward: FloatArray | None = None
    candidate_sft_logprob: FloatArray | None = None
    segments: FloatArray | None = None
    alternatives: tuple[tuple[Alternative, ...], ...] | None = None
    error: ItemError | None = None
