"""The arrays of given responses under an SFT model and a reference, computed in this process, without a service.

N response tokens of a batch; V ids. Must not know jobs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from dense_reward.records import FloatArray, IdArray
from torch import Tensor

from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.policy import Policy, microbatches, own_actions, state_logprobs
from dense_reward_trainer.rl.records import TokenArrays

STATES_TOGETHER = 128


@torch.no_grad()
def token_arrays(
    sft: Policy,
    reference: Policy | None,
    prompts: Sequence[IdArray],
    responses: Sequence[IdArray],
    microbatch_tokens: int,
) -> list[TokenArrays]:
    """The arrays of every response, in order; exact sums over all output rows, at temperature 1.

    Both models read the same microbatch in turn. Raises JobError if a value is not finite.
    """
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, responses, strict=True)]
    found: dict[int, TokenArrays] = {}
    for rows in microbatches(lengths, microbatch_tokens):
        parts = [prompts[b] for b in rows], [responses[b] for b in rows]
        (row_N, step_N), sft_NV = state_logprobs(sft, *parts, 1.0)
        reference_NV = None if reference is None else state_logprobs(reference, *parts, 1.0)[1]
        own_N1 = own_actions(parts[1]).to(row_N.device)[row_N, step_N]
        arrays = {
            name: values_N.float().cpu().numpy() for name, values_N in _all_sums(sft_NV, reference_NV, own_N1).items()
        }
        _check_finite(arrays)
        ends = np.cumsum([len(ids) for ids in parts[1]])[:-1]
        split = {name: np.split(values_N, ends) for name, values_N in arrays.items()}
        for place, b in enumerate(rows):
            found[b] = TokenArrays(**{name: one[place] for name, one in split.items()})
    return [found[b] for b in range(len(responses))]


def _all_sums(sft_NV: Tensor, reference_NV: Tensor | None, own_N1: Tensor) -> dict[str, Tensor]:
    """The arrays of N states, [N] each; few states at a time, because `_sums` makes several tables [N, V]."""
    parts = [
        _sums(
            sft_NV[start : start + STATES_TOGETHER],
            None if reference_NV is None else reference_NV[start : start + STATES_TOGETHER],
            own_N1[start : start + STATES_TOGETHER],
        )
        for start in range(0, len(sft_NV), STATES_TOGETHER)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _sums(sft_NV: Tensor, reference_NV: Tensor | None, own_N1: Tensor) -> dict[str, Tensor]:
    """The arrays of N states, [N] each."""
    probability_NV = sft_NV.exp()
    own_N = sft_NV.gather(1, own_N1)[:, 0]
    entropy_N = -_expectation(probability_NV, sft_NV)
    # centred before it is squared: the difference of two moments would lose digits of a peaked distribution
    variance_N = _expectation(probability_NV, (sft_NV + entropy_N[:, None]).square())
    arrays = {
        "sft_logprob": own_N,
        "entropy": entropy_N,
        "varentropy": variance_N,
        "largest_logprob": sft_NV.max(dim=1).values,
    }
    if reference_NV is None:
        return arrays
    kl_N = _expectation(probability_NV, sft_NV - reference_NV)
    reward_N = own_N - reference_NV.gather(1, own_N1)[:, 0]
    return arrays | {"reward": reward_N, "centred": reward_N - kl_N, "kl": kl_N}


def _expectation(probability_NV: Tensor, values_NV: Tensor) -> Tensor:
    """The mean of values under the probabilities, [N]; an id with probability 0 adds nothing, whatever its value."""
    return torch.where(probability_NV > 0, probability_NV * values_NV, 0.0).sum(dim=1)


def _check_finite(arrays: dict[str, FloatArray]) -> None:
    for name, values_N in arrays.items():
        if not np.isfinite(values_N).all():
            raise JobError(
                f"{name} is not finite at some tokens: an answer has a token that a model gives probability 0, or a "
                "checkpoint has weights that overflow. Try precision=float64, or remove such answers"
            )
