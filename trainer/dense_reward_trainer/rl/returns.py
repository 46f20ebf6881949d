"""Token rewards -> advantages: the KL penalty, returns, baselines and whitening.

Pure tensors of B responses, padded on the right to T tokens; `mask_BT` is 1 on a response's tokens and 0 after them.
Must not know models, prompts or services.

A response that has ended counts with return 0 at every later position: it gets no more reward there. An average over
only the unfinished responses would compare late tokens with long responses only, and would subtract a growing share of
a response's own return: all of it from the longest response, whose last tokens would then teach nothing.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dense_reward_trainer.configs.advantages import BaselineName

ROUNDING = 1e-12  # relative rounding error of float64 sums


def pad(rows: Sequence[NDArray[np.floating] | NDArray[np.integer]], dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of unequal length as one tensor, 0 after each row: [B, T] from rows [T], [B, T, K] from rows [T, K]."""
    inner = rows[0].shape[1:] if rows else ()
    padded = torch.zeros(len(rows), max((len(row) for row in rows), default=0), *inner, dtype=dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.from_numpy(row)
    return padded


def mask_of(lengths: Sequence[int]) -> Tensor:
    """1 on the first `lengths[b]` positions of row b, 0 after them, [B, T] float32."""
    return pad([np.ones(length, dtype=np.float32) for length in lengths])


def minus_kl_penalty(
    reward_BT: Tensor, policy_logprob_BT: Tensor, sft_logprob_BT: Tensor, coefficient: float
) -> Tensor:
    """r_t - b (log pi(a_t|s_t) - log pi_sft(a_t|s_t)), [B, T]: k1, an estimate of KL(pi || pi_sft), in the reward.

    Both log-probs at temperature 1. With samples from pi itself, the expected gradient of REINFORCE on the sum of these
    rewards is that of E[sum r] - b KL(pi || pi_sft), the KL between distributions over whole responses.
    """
    return reward_BT - coefficient * (policy_logprob_BT - sft_logprob_BT).detach()


def reward_to_go(reward_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = sum over k >= t of gamma^(k-t) r_k, [B, T] float64; 0 on padding, also if the rewards are nan there."""
    rewards_BT = torch.where(mask_BT > 0, reward_BT.double(), 0.0)
    returns_BT = torch.zeros_like(rewards_BT)
    running_B = torch.zeros(len(rewards_BT), dtype=torch.float64, device=rewards_BT.device)
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        running_B = rewards_BT[:, t] + gamma * running_B
        returns_BT[:, t] = running_B
    return returns_BT


def immediate(reward_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """r_t, [B, T] float64; 0 on padding. As a return it ignores the states that an action leads to."""
    return torch.where(mask_BT > 0, reward_BT.double(), 0.0)


def total(reward_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """R = sum over all k of r_k, [B, T] float64 at every position, padding included: as if all reward came at the end.

    So a baseline compares whole responses at every position, also responses of different lengths.
    """
    return immediate(reward_BT, mask_BT).sum(dim=1, keepdim=True).expand(reward_BT.shape)


def least_to_go(signal_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """m_t = min over k >= t of signal_k, [B, T] float64; 0 on padding, also if the signals are nan there.

    "Min-form credit assignment" (PURE, arXiv 2504.15275): a response is worth what its worst token is worth. REINFORCE
    with this return follows, at every state s that the policy reaches, the gradient of the mean of Q(s, a) over a from
    pi(.|s). Q is the expected least signal from s on; neither Q nor how often s is reached is differentiated. That is
    not the gradient of E[min over all k of signal_k]: unlike a sum, a minimum does not split into past and future.
    """
    signals_BT = torch.where(mask_BT > 0, signal_BT.double(), torch.inf)
    least_BT = signals_BT.flip(1).cummin(dim=1).values.flip(1)
    return torch.where(mask_BT > 0, least_BT, 0.0)


def batch_mean(return_BT: Tensor) -> Tensor:
    """b_t = 1/B sum over all B responses of G_t, [B, T]; ended responses count with 0.

    The mean includes the response's own return, which scales the expected gradient by 1 - 1/B and changes nothing else.
    It is over all prompts of the batch, so easy and hard prompts get the same baseline.
    """
    return return_BT.mean(dim=0, keepdim=True).expand_as(return_BT)


def leave_one_out(return_BT: Tensor, group_size: int) -> Tensor:
    """b_t = 1/(G-1) sum of G_t over the other responses to the same prompt, [B, T]; ended responses count with 0.

    Rows are in the order of the prompts, `group_size` rows for each. The expected gradient is unchanged.
    Raises ValueError if B is not a multiple of `group_size`, or `group_size` is below 2.
    """
    if group_size < 2:
        raise ValueError(
            f"leave_one_out compares responses to one prompt: group_size is {group_size}, set it to at least 2"
        )
    if len(return_BT) % group_size:
        raise ValueError(f"{len(return_BT)} responses do not make groups of {group_size}")
    return_PGT = return_BT.reshape(len(return_BT) // group_size, group_size, return_BT.shape[1])
    others_PGT = return_PGT.sum(dim=1, keepdim=True) - return_PGT
    return (others_PGT / (group_size - 1)).reshape(return_BT.shape)


def minus_other_answers(return_BT: Tensor, prompts: Sequence[Hashable]) -> Tensor:
    """The returns minus those of the other answers to each row's prompt, [B, T]; rows in any order, groups of any size.

    Raises ValueError if a prompt has one answer.
    """
    advantage_BT = torch.zeros_like(return_BT)
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, other in enumerate(prompts) if other == prompt]
        advantage_BT[rows] = return_BT[rows] - leave_one_out(return_BT[rows], len(rows))
    return advantage_BT


def baseline(name: BaselineName, return_BT: Tensor, group_size: int, kl_BT: Tensor | None = None) -> Tensor:
    """The baseline that is subtracted from the returns, [B, T].

    `kl` is KL(pi_sft(.|s_t) || pi_ref(.|s_t)), the expected reward at s_t under the SFT model. It depends only on the
    state and is subtracted after summing, so the objective is unchanged; centred rewards are a different objective.
    Raises ValueError if the baseline is `kl` and `kl_BT` is None.
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
                raise ValueError("the baseline kl needs the kl of every token: request kl from the service")
            return kl_BT.to(return_BT)


def whitened(advantage_BT: Tensor, mask_BT: Tensor, return_BT: Tensor) -> Tensor:
    """Advantages minus their mean, divided by their standard deviation, both over all tokens, [B, T].

    If all advantages are equal up to the rounding of the returns that they were computed from, all become 0. Whitening
    makes the scale of the gradient depend on the batch: its expectation is no longer the gradient of the objective, and
    kl_coefficient is no longer the weight of the KL.
    """
    tokens = mask_BT.sum()
    mean = (advantage_BT * mask_BT).sum() / tokens
    offset_BT = (advantage_BT - mean) * mask_BT
    deviation = (offset_BT.square().sum() / tokens).sqrt()
    rounding = return_BT.norm() * ROUNDING
    return torch.where(deviation > rounding, offset_BT / deviation, 0.0)
