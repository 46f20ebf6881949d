"""The losses of a head against values and gradients computed by hand, on three tokens."""

from math import exp, log

import pytest
import torch
from dense_reward_trainer.reward_model.losses import HeadValues, aligned_loss, terminal_loss
from torch import Tensor

VALUE_OF = torch.tensor([0.5, -1.0, 2.0])
"""The value after each of three tokens, whatever is before it."""


def values(table_V: Tensor, *responses: tuple[int, ...]) -> HeadValues:
    """Values of responses over three tokens; what is padded must not count."""
    width = max(map(len, responses))
    rows = [torch.cat([table_V[list(ids)], torch.full((width - len(ids),), 100.0)]) for ids in responses]
    return HeadValues(torch.stack(rows), torch.tensor([len(ids) for ids in responses]))


def softplus(x: float) -> float:
    return log(1 + exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_the_aligned_loss_starts_at_the_first_difference() -> None:
    found = aligned_loss(values(VALUE_OF, (0, 2, 1)), values(VALUE_OF, (0, 1, 1)), torch.tensor([1]))
    # position 1: 2 - (-1) = 3; position 2: -1 - (-1) = 0
    assert float(found) == pytest.approx((softplus(-3.0) + softplus(0.0)) / 2)


@pytest.mark.parametrize(
    ("demonstration", "answer", "first", "margins"),
    [
        ((0, 2), (1, 0, 0, 1), 0, (1.5, 1.5, 1.5, 3.0)),  # the demonstration keeps its last value, 2
        ((1, 0, 2), (2,), 0, (-3.0, -1.5, 0.0)),  # the answer keeps its last value, 2
        ((0, 2, 1), (0, 2), 2, (-3.0,)),  # the answer stops where the demonstration goes on
        ((0,), (0, 1), 1, (1.5,)),
    ],
    ids=["longer answer", "longer demonstration", "answer is a prefix", "demonstration is a prefix"],
)
def test_after_its_end_a_response_keeps_its_last_value(
    demonstration: tuple[int, ...], answer: tuple[int, ...], first: int, margins: tuple[float, ...]
) -> None:
    found = aligned_loss(values(VALUE_OF, demonstration), values(VALUE_OF, answer), torch.tensor([first]))
    assert float(found) == pytest.approx(sum(softplus(-margin) for margin in margins) / len(margins))


def test_pairs_count_equally_whatever_their_lengths() -> None:
    pairs = [((0, 2, 1), (0, 1, 1), 1), ((2,), (1,), 0), ((0, 2), (1, 0, 0, 1), 0)]
    single = [float(aligned_loss(values(VALUE_OF, d), values(VALUE_OF, a), torch.tensor([f]))) for d, a, f in pairs]
    together = aligned_loss(
        values(VALUE_OF, *(d for d, _, _ in pairs)),
        values(VALUE_OF, *(a for _, a, _ in pairs)),
        torch.tensor([f for _, _, f in pairs]),
    )
    assert float(together) == pytest.approx(sum(single) / 3)


def test_the_gradient_of_the_aligned_loss() -> None:
    table_V = VALUE_OF.clone().requires_grad_(True)
    torch.autograd.backward(aligned_loss(values(table_V, (0, 2)), values(table_V, (1, 0, 0)), torch.tensor([0])))
    # margins: v0 - v1, v2 - v0, v2 - v0; d softplus(-m) / dm = -sigmoid(-m)
    first, later = -sigmoid(-1.5) / 3, -2 * sigmoid(-1.5) / 3
    assert table_V.grad is not None
    assert table_V.grad.tolist() == pytest.approx([first - later, -first, later])


def test_the_terminal_loss_compares_last_tokens_only() -> None:
    table_V = VALUE_OF.clone().requires_grad_(True)
    found = terminal_loss(values(table_V, (1, 1, 2), (0,)), values(table_V, (0,), (2, 2, 1)))
    assert float(found.detach()) == pytest.approx((softplus(0.5 - 2.0) + softplus(-1.0 - 0.5)) / 2)
    torch.autograd.backward(found)
    one, other = -sigmoid(-1.5) / 2, -sigmoid(-1.5) / 2
    assert table_V.grad is not None
    assert table_V.grad.tolist() == pytest.approx([other - one, -other, one])


def test_equal_values_give_log_2() -> None:
    zeros_V = torch.zeros(3)
    sides = values(zeros_V, (0, 1)), values(zeros_V, (2,))
    assert float(aligned_loss(*sides, torch.tensor([0]))) == pytest.approx(log(2))
    assert float(terminal_loss(*sides)) == pytest.approx(log(2))
