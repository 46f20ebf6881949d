"""Records that several rooms of the trainer exchange. Must not import the modules that make them.

Shapes: P prompt tokens, T tokens of a response, K candidates (the policy's likeliest ids) at each position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dense_reward.records import FloatArray, IdArray


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One response to one prompt. A finished one ends with the end of turn; one that was cut off contains none."""

    prompt_P: IdArray
    response_T: IdArray
    finished: bool


@dataclass(frozen=True, slots=True, eq=False)
class ResponseRewards:
    """The rewards of one response, one number for each of its ids, in nats at temperature 1.

    `kl_T` is None unless it was requested; candidate arrays, [T, K], are None without candidates. An end of turn that
    the response does not contain has no reward.
    """

    signal_T: FloatArray
    sft_logprob_T: FloatArray
    kl_T: FloatArray | None = None
    candidate_signal_TK: FloatArray | None = None
    candidate_sft_logprob_TK: FloatArray | None = None


class TokenRewards(Protocol):
    """A source of token rewards."""

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        """The rewards of exactly the ids of each rollout, in order, and of its `candidates`, ids [T, K]."""
        ...
