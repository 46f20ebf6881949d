"""Policy-gradient and KL losses. Pure tensors [B, T], padded on the right; must not know where advantages come from.

M actions at every position: the sampled one and the candidates.
"""

from typing import Literal

from torch import Tensor

from dense_reward_trainer.configs.dpr import Normalise


def divisor(mask_BT: Tensor, normalise: Normalise) -> int:
    """The number that the loss of a whole batch is divided by: its tokens or its responses, at least 1."""
    count = int(mask_BT.sum()) if normalise == "tokens" else len(mask_BT)
    return max(count, 1)


def policy_gradient(
    logprob_BTM: Tensor,
    old_logprob_BTM: Tensor,
    advantage_BTM: Tensor,
    weight_BTM: Tensor,
    *,
    over: int,
    clip: float | None = None,
) -> Tensor:
    """-1/N sum over tokens and actions of w A rho, rho = pi(a|s_t) / pi_old(a|s_t), a scalar; N is `over`.

    A sampled action has weight w = 1 and a candidate its probability pi_old(a|s_t); w is 0 on padding. If pi is pi_old,
    the gradient is that of REINFORCE, -1/N sum w A grad log pi. With `clip`, rho gains nothing more beyond 1 +- clip in
    the direction of the advantage (PPO, arXiv 1707.06347, equation 7).

    Microbatches of one batch share N, so that their losses add up to the loss of the batch. The log-probs of sampled
    actions are at the sampling temperature, as the samples are. No gradient reaches the advantages.
    """
    advantage_BTM, weight_BTM = advantage_BTM.detach().to(logprob_BTM.dtype), weight_BTM.to(logprob_BTM.dtype)
    ratio_BTM = (logprob_BTM - old_logprob_BTM.to(logprob_BTM.dtype).detach()).exp()
    gain_BTM = ratio_BTM * advantage_BTM
    if clip is not None:
        gain_BTM = gain_BTM.minimum(ratio_BTM.clamp(1 - clip, 1 + clip) * advantage_BTM)
    return -(weight_BTM * gain_BTM).sum() / over


def kl_loss(
    name: Literal["loss_k2", "loss_k3"],
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    sft_logprob_BT: Tensor,
    mask_BT: Tensor,
    *,
    over: int,
) -> Tensor:
    """1/N sum over tokens of rho times an estimate of the KL to the SFT model, rho = pi(a_t|s_t) / pi_old(a_t|s_t).

    The estimates are those of Schulman ("Approximating KL divergence", 2020).

    With d = log pi - log pi_sft of the sampled token, k2 = d^2 / 2: its expected gradient is that of KL(pi || pi_sft)
    at each state. k3 = exp(-d) - 1 + d has the expectation KL(pi || pi_sft), but the expected gradient of
    KL(pi_sft || pi). Both ignore that an action changes the states after it. Samples must be from pi_old at temperature
    1. After the first update of a batch they are no longer from pi: rho, through which no gradient flows, corrects this
    for the action, not for the states before it, and is not clipped.
    """
    difference_BT = logprob_BT - sft_logprob_BT.to(logprob_BT.dtype).detach()
    k2, k3 = difference_BT.square() / 2, (-difference_BT).exp() - 1 + difference_BT
    estimate_BT = k2 if name == "loss_k2" else k3
    ratio_BT = (logprob_BT - old_logprob_BT.to(logprob_BT.dtype)).detach().exp()
    return (mask_BT.to(logprob_BT.dtype) * ratio_BT * estimate_BT).sum() / over
