"""Records that several rooms of the trainer exchange. Must not import what makes them: numpy only.

Shapes: P prompt tokens, T tokens of a response, K ids that the policy named at each position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dense_reward.records import FloatArray, IdArray


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One response to one prompt. A finished one ends with the end of turn; one that was cut off holds none at all."""

    prompt_P: IdArray
    response_T: IdArray
    finished: bool


@dataclass(frozen=True, slots=True, eq=False)
class ResponseRewards:
    """Of one response, one number for each of its ids, in nats at temperature 1. `kl_T` only where it was asked for.

    Of the K ids that the caller named at each position, [T, K] each; None where it named none. There is nothing here
    for an end of turn that the response does not hold.
    """

    signal_T: FloatArray
    sft_logprob_T: FloatArray
    kl_T: FloatArray | None = None
    candidate_signal_TK: FloatArray | None = None
    candidate_sft_logprob_TK: FloatArray | None = None


class TokenRewards(Protocol):
    """A source of token rewards."""

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        """The rewards of the very ids of each rollout, in order, and of its `candidates`, ids [T, K]."""
        ...
