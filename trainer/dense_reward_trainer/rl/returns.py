"""Token rewards -> advantages: the KL penalty, reward-to-go, and the baselines that are subtracted from it.

Pure tensors of B responses, padded on the right to T tokens; `mask_BT` is 1 on a response's tokens and 0 after them.
Must not know models, prompts or services.

A response that has ended counts with return 0 at every later position: nothing more can be earned there. An average
over the unfinished siblings alone would compare late tokens with long responses only, and would subtract a growing
share of a response's own return (all of it from the longest one, whose last tokens would then teach nothing).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dense_reward_trainer.configs.dpr import BaselineName

ROUNDING = 1e-12  # of float64 sums, relative


def pad(rows: Sequence[NDArray[np.floating] | NDArray[np.integer]], dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of unequal length as one tensor, [B, T] of rows [T] and [B, T, K] of rows [T, K], 0 after each one's end."""
    inner = rows[0].shape[1:] if rows else ()
    padded = torch.zeros(len(rows), max((len(row) for row in rows), default=0), *inner, dtype=dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.from_numpy(row)
    return padded


def mask_of(lengths: Sequence[int]) -> Tensor:
    """1 on the first `lengths[b]` positions of row b, 0 after them, [B, T] float32."""
    return pad([np.ones(length, dtype=np.float32) for length in lengths])


def less_kl_penalty(reward_BT: Tensor, policy_logprob_BT: Tensor, sft_logprob_BT: Tensor, coefficient: float) -> Tensor:
    """r_t - b (log pi(a_t|s_t) - log pi_sft(a_t|s_t)), [B, T]: the estimate k1 of KL(pi || pi_sft), paid as a reward.

    Both log-probs at temperature 1. Under samples from pi itself the expected gradient of REINFORCE on the sum of these
    rewards is that of E[sum r] - b KL(pi || pi_sft), the KL between distributions over whole responses.
    """
    return reward_BT - coefficient * (policy_logprob_BT - sft_logprob_BT).detach()


def reward_to_go(reward_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = sum over k >= t of gamma^(k-t) r_k, [B, T] float64; 0 on padding, whatever the rewards hold there."""
    rewards_BT = torch.where(mask_BT > 0, reward_BT.double(), 0.0)
    returns_BT = torch.zeros_like(rewards_BT)
    running_B = torch.zeros(len(rewards_BT), dtype=torch.float64, device=rewards_BT.device)
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        running_B = rewards_BT[:, t] + gamma * running_B
        returns_BT[:, t] = running_B
    return returns_BT


def immediate(reward_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """r_t, [B, T] float64; 0 on padding. As a return it is blind to the states that an action leads to."""
    return torch.where(mask_BT > 0, reward_BT.double(), 0.0)


def total(reward_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """R = sum over all k of r_k, [B, T] float64, at every position, padding included: as if it were paid at the end.

    A baseline then compares whole responses at every position, whatever their lengths.
    """
    return immediate(reward_BT, mask_BT).sum(dim=1, keepdim=True).expand(reward_BT.shape)


def batch_mean(return_BT: Tensor) -> Tensor:
    """b_t = 1/B sum over all B responses of G_t, [B, T]; ended responses count with 0.

    A response's own return is in the mean, which scales the expected gradient by 1 - 1/B and changes nothing else. The
    mean is over all prompts of the batch, so it does not know which prompts are easy.
    """
    return return_BT.mean(dim=0, keepdim=True).expand_as(return_BT)


def leave_one_out(return_BT: Tensor, group_size: int) -> Tensor:
    """b_t = 1/(G-1) sum of G_t over the other responses to the same prompt, [B, T]; ended responses count with 0.

    Rows lie prompt by prompt, `group_size` of them each. The expected gradient is unchanged.
    Raises ValueError where B is no multiple of `group_size`, or `group_size` leaves nobody else.
    """
    if group_size < 2:
        raise ValueError(
            f"leave_one_out compares responses to one prompt: group_size is {group_size}, at least 2 needed"
        )
    if len(return_BT) % group_size:
        raise ValueError(f"{len(return_BT)} responses do not make groups of {group_size}")
    return_PGT = return_BT.reshape(len(return_BT) // group_size, group_size, return_BT.shape[1])
    others_PGT = return_PGT.sum(dim=1, keepdim=True) - return_PGT
    return (others_PGT / (group_size - 1)).reshape(return_BT.shape)


def baseline(name: BaselineName, return_BT: Tensor, group_size: int, kl_BT: Tensor | None = None) -> Tensor:
    """What is subtracted from the reward-to-go, [B, T].

    `kl` is KL(pi_sft(.|s_t) || pi_ref(.|s_t)): the reward that the SFT model expects at s_t. It depends on the state
    alone and is subtracted after summing, so the objective stays what it was; centred rewards are another objective.
    Raises ValueError where `kl` is asked for and not given.
    """
    match name:
        case "none":
            return torch.zeros_like(return_BT)
        case "batch":
            return batch_mean(return_BT)
        case "leave_one_out":
            return leave_one_out(return_BT, group_size)
        case "kl":
            if kl_BT is None:
                raise ValueError("the baseline kl needs the kl of every token: ask the service for it")
            return kl_BT.to(return_BT)


def whitened(advantage_BT: Tensor, mask_BT: Tensor, return_BT: Tensor) -> Tensor:
    """Advantages over their standard deviation over all tokens, after their mean was subtracted, [B, T].

    Where all are equal, but for the rounding of the returns that they were taken from, all become 0. The scale of the
    gradient then depends on the batch at hand, so its expectation is no longer the gradient of the objective, nor is a
    KL coefficient what it says.
    """
    tokens = mask_BT.sum()
    mean = (advantage_BT * mask_BT).sum() / tokens
    offset_BT = (advantage_BT - mean) * mask_BT
    deviation = (offset_BT.square().sum() / tokens).sqrt()
    rounding = return_BT.norm() * ROUNDING
    return torch.where(deviation > rounding, offset_BT / deviation, 0.0)
