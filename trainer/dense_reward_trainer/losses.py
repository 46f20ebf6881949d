"""Policy-gradient losses. Pure tensors [B, T], padded on the right; must not know where advantages come from."""

from torch import Tensor

from dense_reward_trainer.policy_config import Normalise


def divisor(mask_BT: Tensor, normalise: Normalise) -> int:
    """What the loss of a whole batch is divided by: its tokens, or its responses. At least 1."""
    count = int(mask_BT.sum()) if normalise == "tokens" else len(mask_BT)
    return max(count, 1)


def reinforce(logprob_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, over: int) -> Tensor:
    """-1/N sum over tokens of A_t log pi(a_t|s_t), a scalar; N is `over`, the divisor of the whole batch.

    Microbatches of one batch share N, so that their losses add up to the batch's. The log-probs are those of the
    distribution that was sampled from: at the sampling temperature. No gradient reaches the advantages.
    """
    return -(mask_BT * advantage_BT.detach().to(logprob_BT.dtype) * logprob_BT).sum() / over
