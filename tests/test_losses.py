"""The REINFORCE loss: its gradient, its divisor, and microbatches that add up."""

import pytest
import torch
from dense_reward_trainer.losses import divisor, reinforce
from dense_reward_trainer.policy_config import Normalise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

LOGPROB_BT = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -8.0, -8.0]])
ADVANTAGE_BT = torch.tensor([[1.0, -1.0, 2.0], [3.0, 100.0, 100.0]])
MASK_BT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(("normalise", "expected"), [("tokens", 8.5 / 4), ("sequences", 8.5 / 2)])
def test_the_loss_is_the_mean_of_advantage_times_log_prob(normalise: Normalise, expected: float) -> None:
    loss = reinforce(LOGPROB_BT, ADVANTAGE_BT, MASK_BT, divisor(MASK_BT, normalise))
    assert float(loss) == expected


def test_the_gradient_is_minus_the_advantage_and_none_reaches_advantages_or_padding() -> None:
    logprob_BT, advantage_BT = LOGPROB_BT.clone().requires_grad_(), ADVANTAGE_BT.clone().requires_grad_()
    torch.autograd.backward(reinforce(logprob_BT, advantage_BT, MASK_BT, 2))
    assert advantage_BT.grad is None
    assert logprob_BT.grad is not None
    assert logprob_BT.grad.tolist() == [[-0.5, 0.5, -1.0], [-1.5, 0.0, 0.0]]


def test_a_batch_of_empty_responses_has_loss_0() -> None:
    empty_BT = torch.zeros(2, 1)
    assert float(reinforce(empty_BT, empty_BT, empty_BT, divisor(empty_BT, "tokens"))) == 0.0


def lengths_and_cut(lengths: list[int], cut: int) -> tuple[Tensor, int]:
    mask_BT = torch.stack([(torch.arange(5) < length).double() for length in lengths])
    return mask_BT, cut % (len(lengths) + 1)


@settings(deadline=None)
@given(
    st.builds(lengths_and_cut, st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 10)),
    st.sampled_from(["tokens", "sequences"]),
    st.integers(0, 1000),
)
def test_microbatches_add_up_to_the_batch(sized: tuple[Tensor, int], normalise: Normalise, seed: int) -> None:
    mask_BT, cut = sized
    generator = torch.Generator().manual_seed(seed)
    logprob_BT = torch.randn(mask_BT.shape, generator=generator, dtype=torch.float64)
    advantage_BT = torch.randn(mask_BT.shape, generator=generator, dtype=torch.float64)
    over = divisor(mask_BT, normalise)
    whole = reinforce(logprob_BT, advantage_BT, mask_BT, over)
    parts = sum(
        float(reinforce(logprob_BT[part], advantage_BT[part], mask_BT[part], over))
        for part in (slice(None, cut), slice(cut, None))
    )
    assert float(whole) == pytest.approx(parts, abs=1e-12)
