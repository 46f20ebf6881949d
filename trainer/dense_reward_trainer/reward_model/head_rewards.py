"""The rewards that a head gives a policy, and the log-probs of the SFT model for its KL penalty, in this process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from dense_reward.engines.token_head.engine import HeadModel
from dense_reward.records import FloatArray, IdArray
from numpy.typing import NDArray

from dense_reward_trainer.rl.policy import Policy, frozen_logprobs, microbatches
from dense_reward_trainer.rl.records import ResponseRewards, Rollout


@dataclass(frozen=True, slots=True, eq=False)
class SftLogprobs:
    """TokenRewards of 0, with the log-probs of a frozen SFT model: enough to measure the KL to it."""

    sft: Policy
    microbatch_tokens: int

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        """Raises ValueError for candidates, which are not scored."""
        if candidates is not None:
            raise ValueError("no candidates are scored here: set candidates to 0")
        prompts, responses = [r.prompt_P for r in rollouts], [r.response_T for r in rollouts]
        sft_BT = frozen_logprobs(self.sft, prompts, responses, self.microbatch_tokens).numpy()
        return [
            ResponseRewards(np.zeros(len(ids), dtype=np.float32), sft_T[: len(ids)].astype(np.float32))
            for ids, sft_T in zip(responses, sft_BT, strict=True)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class HeadRewards:
    """TokenRewards of a head: the last token of a response gets the value after it less `zero`, all others get 0.

    Only differences of values between responses to one prompt are learnt, so their zero is free. A constant changes no
    objective, but the nearer the rewards are to 0, the less noise the gradient has. `sft` is frozen.
    """

    head: HeadModel
    sft: Policy
    microbatch_tokens: int
    zero: float = 0.0

    def with_zero_at_mean(self, rollouts: Sequence[Rollout]) -> Self:
        """The same rewards with the mean value of these responses as their zero."""
        return replace(self, zero=float(self.terminal_values(rollouts).mean(dtype=np.float64)))

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        """Raises ValueError for candidates: a head has no value of a token that was not sampled."""
        if candidates is not None:
            raise ValueError("a head scores no candidates: set candidates to 0")
        return [
            replace(scored, signal_T=_at_the_end(value - self.zero, len(scored.signal_T)))
            for value, scored in zip(
                self.terminal_values(rollouts),
                SftLogprobs(self.sft, self.microbatch_tokens).score(rollouts),
                strict=True,
            )
        ]

    def terminal_values(self, rollouts: Sequence[Rollout]) -> NDArray[np.float32]:
        """The head's value after the last token of each response, in order."""
        sequences = [np.concatenate([r.prompt_P, r.response_T]) for r in rollouts]
        found_B = np.empty(len(sequences), dtype=np.float32)
        for rows in microbatches([len(ids) for ids in sequences], self.microbatch_tokens):
            last = [np.array([len(sequences[b]) - 1]) for b in rows]
            found_B[rows] = self.head.padded_values([sequences[b] for b in rows], last).cpu().numpy()
        return found_B


def _at_the_end(value: float, tokens: int) -> FloatArray:
    reward_T = np.zeros(tokens, dtype=np.float32)
    reward_T[-1] = value
    return reward_T
