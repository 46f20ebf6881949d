"""Records that several rooms of the trainer exchange. Must not import the modules that make them.

Shapes: P prompt tokens, T tokens of a response, K candidates (the policy's likeliest ids) at each position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dense_reward.records import FloatArray, IdArray


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One response to one prompt. A finished one ends with the end of turn; one that was cut off contains none."""

    prompt_P: IdArray
    response_T: IdArray
    finished: bool


# Is called with the rollouts of each batch, as soon as they are sampled.
OnBatch = Callable[[Sequence[Rollout]], None]


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


@dataclass(frozen=True, slots=True, eq=False)
class TokenArrays:
    """What an SFT model, and a reference, say of the T tokens of one response; each [T] float32, in nats.

    Named as in the service's answers. `varentropy`, in nats^2, is the variance of log pi_sft under pi_sft at each
    state; `largest_logprob` is the log-prob of the likeliest token. `reward`, `centred` and `kl` are None without a
    reference.
    """

    sft_logprob: FloatArray
    entropy: FloatArray
    varentropy: FloatArray
    largest_logprob: FloatArray
    reward: FloatArray | None = None
    centred: FloatArray | None = None
    kl: FloatArray | None = None


class TokenRewards(Protocol):
    """A source of token rewards."""

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        """The rewards of exactly the ids of each rollout, in order, and of its `candidates`, ids [T, K]."""
        ...
