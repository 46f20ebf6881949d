"""The policy-gradient loss: its gradient, ratios, clipping, divisor, microbatches that add up; and the KL losses."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from dense_reward_trainer.configs.dpr import Normalise
from dense_reward_trainer.rl.losses import divisor, kl_loss, policy_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

LOGPROB_BT = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -8.0, -8.0]])
ADVANTAGE_BT = torch.tensor([[1.0, -1.0, 2.0], [3.0, 100.0, 100.0]])
MASK_BT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


def reinforce(logprob_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, over: int) -> Tensor:
    """The loss on policy: the ratios are 1."""
    return policy_gradient(logprob_BT, logprob_BT, advantage_BT, mask_BT, over=over)


@pytest.mark.parametrize(("normalise", "count"), [("tokens", 4), ("sequences", 2)])
def test_the_gradient_is_minus_the_advantage_and_none_reaches_advantages_or_padding(
    normalise: Normalise, count: int
) -> None:
    logprob_BT, advantage_BT = LOGPROB_BT.clone().requires_grad_(), ADVANTAGE_BT.clone().requires_grad_()
    over = divisor(MASK_BT, normalise)
    torch.autograd.backward(reinforce(logprob_BT, advantage_BT, MASK_BT, over))
    assert over == count
    assert advantage_BT.grad is None
    assert logprob_BT.grad is not None
    assert logprob_BT.grad.tolist() == [[-1 / count, 1 / count, -2 / count], [-3 / count, 0.0, 0.0]]


def test_off_policy_the_gradient_is_weighted_by_the_ratio() -> None:
    logprob_BT = LOGPROB_BT.clone().requires_grad_()
    old_BT = LOGPROB_BT - math.log(2)
    torch.autograd.backward(policy_gradient(logprob_BT, old_BT, ADVANTAGE_BT, MASK_BT, over=1))
    assert logprob_BT.grad is not None
    torch.testing.assert_close(logprob_BT.grad, -2 * ADVANTAGE_BT * MASK_BT)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(1.1, 1.0, -1.1), (1.3, 1.0, 0.0), (0.5, 1.0, -0.5), (0.9, -1.0, 0.9), (0.5, -1.0, 0.0), (1.3, -1.0, 1.3)],
)
def test_clipping_ends_the_gain_on_the_side_that_the_advantage_pushes_to(
    ratio: float, advantage: float, gradient: float
) -> None:
    logprob_11 = torch.zeros(1, 1, requires_grad=True)
    old_11, advantage_11 = torch.tensor([[-math.log(ratio)]]), torch.tensor([[advantage]])
    torch.autograd.backward(policy_gradient(logprob_11, old_11, advantage_11, torch.ones(1, 1), over=1, clip=0.2))
    assert logprob_11.grad is not None
    assert float(logprob_11.grad) == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "gradient"), [("loss_k2", lambda d: d), ("loss_k3", lambda d: 1 - math.exp(-d))], ids=["k2", "k3"]
)
def test_a_kl_loss_pulls_by_its_own_function_of_the_log_ratio(
    name: Literal["loss_k2", "loss_k3"], gradient: Callable[[float], float]
) -> None:
    logprob_12 = torch.tensor([[-1.0, -7.0]], requires_grad=True)
    sft_12, mask_12 = torch.tensor([[-1.5, 0.0]]), torch.tensor([[1.0, 0.0]])
    torch.autograd.backward(kl_loss(name, logprob_12, logprob_12, sft_12, mask_12, over=1))
    assert logprob_12.grad is not None
    assert logprob_12.grad[0].tolist() == pytest.approx([gradient(0.5), 0.0])
    assert float(kl_loss(name, sft_12, sft_12, sft_12, mask_12, over=1)) == 0.0


@pytest.mark.parametrize("name", ["loss_k2", "loss_k3"])
def test_samples_of_an_older_policy_still_give_the_gradient_of_the_kl_of_this_one(
    name: Literal["loss_k2", "loss_k3"],
) -> None:
    """One state with three actions: the expectation under the older policy, against the exact KL."""
    logits_3 = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    old_3, sft_3 = (torch.tensor(row, dtype=torch.float64).log() for row in ([0.2, 0.5, 0.3], [0.6, 0.3, 0.1]))
    logprob_3 = logits_3.log_softmax(0)
    mask_11 = torch.ones(1, 1, dtype=torch.float64)
    losses = [
        kl_loss(name, logprob_3[a, None, None], old_3[a, None, None], sft_3[a, None, None], mask_11, over=1)
        for a in range(3)
    ]
    (found_3,) = torch.autograd.grad((old_3.exp() * torch.stack(losses)).sum(), logits_3)
    this_3 = logits_3.log_softmax(0)
    reverse, forward = (this_3.exp() * (this_3 - sft_3)).sum(), (sft_3.exp() * (sft_3 - this_3)).sum()
    (expected_3,) = torch.autograd.grad(reverse if name == "loss_k2" else forward, logits_3)
    torch.testing.assert_close(found_3, expected_3, rtol=0, atol=1e-12)


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
