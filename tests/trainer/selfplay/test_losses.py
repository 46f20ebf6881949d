"""The losses of self-play against values computed by hand, for responses of one token of a vocabulary of three."""

import math

import pytest
import torch
from dense_reward_trainer.configs.irft import LossName
from dense_reward_trainer.selfplay.losses import loss_at_start, pair_losses

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
OLD = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
DEMONSTRATED, GENERATED, BETA = 0, 2, 0.5  # D = log 2, D' = log 0.4

# loss, b, value, gradient with respect to the three logits of the policy
BY_HAND: list[tuple[LossName, float, float, tuple[float, float, float]]] = [
    ("sigmoid", 0.0, 0.369640, (-0.154508, 0.0, 0.154508)),
    ("bernoulli", 0.0, 1.024885, (-0.200410, 0.004018, 0.196392)),
    ("bernoulli", 2.0, 1.827153, (-0.227768, -0.110459, 0.338227)),
]


@pytest.mark.parametrize(("loss", "b", "value", "gradient"), BY_HAND)
def test_loss_and_gradient_are_those_computed_by_hand(
    loss: LossName, b: float, value: float, gradient: tuple[float, float, float]
) -> None:
    logits_V = POLICY.log().requires_grad_(True)
    ratio_V = torch.log_softmax(logits_V, 0) - OLD.log()
    result = pair_losses(loss, ratio_V[DEMONSTRATED], ratio_V[GENERATED], BETA, b)
    torch.autograd.backward(result)
    assert float(result.detach()) == pytest.approx(value, abs=2e-6)
    assert logits_V.grad is not None
    assert logits_V.grad.tolist() == pytest.approx(gradient, abs=2e-6)


def test_a_model_that_is_its_own_reference_has_a_known_loss() -> None:
    assert loss_at_start("sigmoid") == pytest.approx(math.log(2))
    assert loss_at_start("bernoulli") == pytest.approx(2 * math.log(2))
    assert loss_at_start("bernoulli", 2.0) == pytest.approx(math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2)))


def test_a_pair_of_equal_responses_has_no_gradient_with_sigmoid() -> None:
    ratio_1 = torch.tensor([0.7], requires_grad=True)
    torch.autograd.backward(pair_losses("sigmoid", ratio_1, ratio_1, BETA).sum())
    assert ratio_1.grad is not None
    assert ratio_1.grad.tolist() == [0.0]
