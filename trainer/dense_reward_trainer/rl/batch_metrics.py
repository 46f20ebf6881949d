"""Metrics of the samples of a step of DPR. Pure functions."""

from torch import Tensor

from dense_reward_trainer.rl.advantages import Batch

PER_TOKEN = frozenset({"reward_mean", "kl_to_sft_per_token", "entropy"})
"""The metrics that are means over tokens; the others are means over responses."""


def describe(batch: Batch, shaped_BT: Tensor) -> dict[str, float]:
    """Metrics of the samples of a step. KL and entropy are estimates from these samples, in nats.

    At another sampling temperature than 1, `kl_to_sft` is no KL and can be negative: it is the mean of log pi - log
    pi_sft, with pi at 1, under other samples. `entropy` is then a cross-entropy.
    """
    log_ratio_BT = (batch.policy_logprob_BT - batch.sft_logprob_BT) * batch.mask_BT
    tokens, responses = float(batch.mask_BT.sum()), len(batch.rollouts)
    return {
        "reward_mean": float(batch.signal_BT.sum()) / tokens,
        "reward_sum": float(batch.signal_BT.sum()) / responses,
        "paid_sum": float((shaped_BT * batch.mask_BT).sum()) / responses,
        "kl_to_sft": float(log_ratio_BT.sum()) / responses,
        "kl_to_sft_per_token": float(log_ratio_BT.sum()) / tokens,
        "entropy": -float(batch.policy_logprob_BT.sum()) / tokens,
        "length_mean": tokens / responses,
        "truncated": sum(not rollout.finished for rollout in batch.rollouts) / responses,
    }
