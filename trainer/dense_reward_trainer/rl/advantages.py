"""Advantage estimation: scored rollouts -> the advantage and weight of each action, by the options of DPR.

B responses, right-padded to T tokens; K candidates, the policy's likeliest ids, at every position. Everything is on the
CPU; log-probs and rewards are at temperature 1. Must not know models, services or optimisers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dense_reward_trainer.configs.advantages import AdvantageOptions
from dense_reward_trainer.rl.records import ResponseRewards, Rollout
from dense_reward_trainer.rl.returns import (
    baseline,
    immediate,
    least_to_go,
    mask_of,
    minus_kl_penalty,
    pad,
    reward_to_go,
    total,
    whitened,
)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The candidates of every position, with their log-probs and signal, [B, T, K]."""

    ids_BTK: Tensor
    policy_logprob_BTK: Tensor
    signal_BTK: Tensor
    sft_logprob_BTK: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rollouts of a step, and the log-probs and signal of each token, [B, T]."""

    rollouts: Sequence[Rollout]
    mask_BT: Tensor
    signal_BT: Tensor
    policy_logprob_BT: Tensor
    sft_logprob_BT: Tensor
    kl_BT: Tensor | None
    candidates: Candidates | None = None

    @property
    def candidate_count(self) -> int:
        """K, 0 without candidates."""
        return 0 if self.candidates is None else self.candidates.ids_BTK.shape[2]


@dataclass(frozen=True, slots=True, eq=False)
class Actions:
    """The M = 1 + K actions of every position, [B, T, M]: the sampled one, then the candidates.

    `weight_BTM` is 1 for a sampled action, the policy's probability for a candidate, and 0 on padding.
    """

    ids_BTM: Tensor
    advantage_BTM: Tensor
    weight_BTM: Tensor


def make_batch(
    rollouts: Sequence[Rollout], ids_BTM: Tensor, policy_logprob_BTM: Tensor, scored: Sequence[ResponseRewards]
) -> Batch:
    """A batch from rollouts, the ids and log-probs of their actions (sampled, then candidates), and their rewards.

    A response that was cut off contains no end of turn, so only its own ids get rewards, one each.
    """
    kl_rows = [rewards.kl_T for rewards in scored if rewards.kl_T is not None]
    signal_rows = [rewards.candidate_signal_TK for rewards in scored if rewards.candidate_signal_TK is not None]
    sft_rows = [rewards.candidate_sft_logprob_TK for rewards in scored if rewards.candidate_sft_logprob_TK is not None]
    candidates = None
    if ids_BTM.shape[2] > 1:
        candidates = Candidates(ids_BTM[..., 1:], policy_logprob_BTM[..., 1:], pad(signal_rows), pad(sft_rows))
    return Batch(
        rollouts=rollouts,
        mask_BT=mask_of([len(rollout.response_T) for rollout in rollouts]),
        signal_BT=pad([rewards.signal_T for rewards in scored]),
        policy_logprob_BT=policy_logprob_BTM[..., 0],
        sft_logprob_BT=pad([rewards.sft_logprob_T for rewards in scored]),
        kl_BT=pad(kl_rows) if len(kl_rows) == len(rollouts) else None,
        candidates=candidates,
    )


def shaped_rewards(batch: Batch, config: AdvantageOptions, coefficient: float) -> Tensor:
    """The signal of every token, [B, T]: clipped to `reward_clip`, minus the KL penalty if `kl_penalty` is "reward"."""
    return _shaped(batch.signal_BT, batch.policy_logprob_BT, batch.sft_logprob_BT, config, coefficient)


def token_returns(batch: Batch, config: AdvantageOptions, coefficient: float) -> Tensor:
    """The return that credits each sampled token, [B, T] float64.

    `min` is only that of the signals: the KL penalty is added as its own reward-to-go, so that its expected gradient
    stays that of the KL between whole responses.
    """
    shaped_BT = shaped_rewards(batch, config, coefficient)
    match config.returns:
        case "reward_to_go":
            return reward_to_go(shaped_BT, batch.mask_BT, config.gamma)
        case "immediate":
            return immediate(shaped_BT, batch.mask_BT)
        case "total":
            return total(shaped_BT, batch.mask_BT)
        case "min":
            nothing_BT = torch.zeros_like(batch.signal_BT)
            penalty_BT = _shaped(nothing_BT, batch.policy_logprob_BT, batch.sft_logprob_BT, config, coefficient)
            least_BT = least_to_go(_clipped(batch.signal_BT, config), batch.mask_BT)
            return least_BT + reward_to_go(penalty_BT, batch.mask_BT)


def action_advantages(batch: Batch, config: AdvantageOptions, coefficient: float) -> Actions:
    """Advantages and weights of all actions: returns minus a baseline, [B, T, 1 + K], 0 on padding.

    With candidates C, the gradient of the immediate reward f is summed over C; the sample a_t adds its own term only if
    it is not in C:

        sum over a in C of pi(a) (f(a) - B) grad log pi(a)
        + [a_t not in C] (f(a_t) - B) grad log pi(a_t) + (G_(t+1) - b_(t+1)) grad log pi(a_t)

    with B = sum over a in C of pi(a) f(a). B and C depend only on the state, so the expectation is that of the sampled
    gradient (Liu et al., arXiv 1810.04777). The credit for later rewards, G_(t+1), stays sampled.
    """
    ids_BT = pad([rollout.response_T for rollout in batch.rollouts], torch.long)
    if batch.candidates is None:
        return_BT = token_returns(batch, config, coefficient)
        advantage_BT = return_BT - baseline(config.baseline, return_BT, config.group_size, batch.kl_BT)
        advantage_BT = advantage_BT * batch.mask_BT
        if config.whiten:
            advantage_BT = whitened(advantage_BT, batch.mask_BT, return_BT)
        return Actions(ids_BT[..., None], advantage_BT[..., None], batch.mask_BT[..., None])
    return _with_candidates(batch, batch.candidates, ids_BT, config, coefficient)


def _with_candidates(
    batch: Batch, candidates: Candidates, ids_BT: Tensor, config: AdvantageOptions, coefficient: float
) -> Actions:
    immediate_BT = shaped_rewards(batch, config, coefficient).double()
    immediate_BTK = _shaped(
        candidates.signal_BTK, candidates.policy_logprob_BTK, candidates.sft_logprob_BTK, config, coefficient
    ).double()
    probability_BTK = candidates.policy_logprob_BTK.double().exp() * batch.mask_BT[..., None]
    expected_BT = (probability_BTK * immediate_BTK).sum(dim=2)
    outside_BT = (candidates.ids_BTK != ids_BT[..., None]).all(dim=2)
    advantage_BT = torch.where(outside_BT, immediate_BT - expected_BT, 0.0)
    if config.returns == "reward_to_go":
        # expected_BT is the baseline of the immediate reward; config.baseline is only for the later ones
        later_BT = config.gamma * _next(reward_to_go(immediate_BT, batch.mask_BT, config.gamma))
        advantage_BT = advantage_BT + later_BT - baseline(config.baseline, later_BT, config.group_size)
    return Actions(
        torch.cat([ids_BT[..., None], candidates.ids_BTK], dim=2),
        torch.cat([advantage_BT[..., None], immediate_BTK - expected_BT[..., None]], dim=2) * batch.mask_BT[..., None],
        torch.cat([batch.mask_BT[..., None].double(), probability_BTK], dim=2),
    )


def _shaped(
    signal: Tensor, policy_logprob: Tensor, sft_logprob: Tensor, config: AdvantageOptions, coefficient: float
) -> Tensor:
    signal = _clipped(signal, config)
    return minus_kl_penalty(signal, policy_logprob, sft_logprob, coefficient if config.kl_penalty == "reward" else 0.0)


def _clipped(signal: Tensor, config: AdvantageOptions) -> Tensor:
    return signal if config.reward_clip is None else signal.clamp(-config.reward_clip, config.reward_clip)


def _next(return_BT: Tensor) -> Tensor:
    """G_(t+1) at position t, 0 at the last one."""
    return torch.cat([return_BT[:, 1:], torch.zeros_like(return_BT[:, :1])], dim=1)
