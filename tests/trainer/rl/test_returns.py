"""Returns and baselines against their definitions as plain loops."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from dense_reward.reward import return_to_go
from dense_reward_trainer.configs.advantages import BaselineName
from dense_reward_trainer.rl.returns import (
    baseline,
    batch_mean,
    least_to_go,
    leave_one_out,
    mask_of,
    minus_kl_penalty,
    minus_other_answers,
    pad,
    reward_to_go,
    whitened,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

Rows = list[NDArray[np.float32]]
rewards = st.floats(-5, 5, width=32)
responses = st.lists(st.lists(rewards, max_size=6), min_size=1, max_size=6)
groups = st.integers(2, 4).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.integers(1, 3).flatmap(
            lambda prompts: st.lists(st.lists(rewards, max_size=5), min_size=size * prompts, max_size=size * prompts)
        ),
    )
)


def rows_of(lists: Sequence[Sequence[float]]) -> Rows:
    return [np.array(row, dtype=np.float32) for row in lists]


def returns_of(rows: Rows, gamma: float = 1.0) -> Tensor:
    return reward_to_go(pad(rows), mask_of([len(row) for row in rows]), gamma)


@settings(deadline=None)
@given(responses, st.floats(0, 1))
def test_reward_to_go_is_the_discounted_sum_of_what_is_still_to_come(lists: list[list[float]], gamma: float) -> None:
    rows = rows_of(lists)
    returns_BT = returns_of(rows, gamma)
    for b, row in enumerate(rows):
        for t in range(returns_BT.shape[1]):
            expected = sum(gamma ** (k - t) * float(row[k]) for k in range(t, len(row)))
            assert float(returns_BT[b, t]) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(responses, st.sampled_from([1.0, 0.9]))
def test_reward_to_go_agrees_with_the_services_own(lists: list[list[float]], gamma: float) -> None:
    rows = rows_of(lists)
    returns_BT = returns_of(rows, gamma)
    for b, row in enumerate(rows):
        np.testing.assert_allclose(returns_BT[b, : len(row)].numpy(), return_to_go(row, gamma), rtol=1e-5, atol=1e-5)


def test_what_lies_on_padding_reaches_no_return() -> None:
    reward_BT = torch.tensor([[1.0, 2.0, float("nan")], [1.0, 1.0, 1.0]])
    returns_BT = reward_to_go(reward_BT, mask_of([2, 3]))
    assert returns_BT.tolist() == [[3.0, 2.0, 0.0], [3.0, 2.0, 1.0]]


def test_the_batch_mean_counts_ended_responses_with_0() -> None:
    returns_BT = returns_of(rows_of([[4.0], [1.0, 2.0], [0.0, 0.0, 6.0]]))
    assert batch_mean(returns_BT).tolist() == [[13 / 3, 8 / 3, 2.0]] * 3


def test_leave_one_out_counts_ended_siblings_with_0_and_knows_no_other_prompt() -> None:
    returns_BT = returns_of(rows_of([[4.0], [1.0, 2.0], [3.0], [7.0, 7.0], [0.0], [0.0, 0.0]]))
    assert leave_one_out(returns_BT, 3)[:3].tolist() == [[3.0, 1.0], [3.5, 0.0], [3.5, 1.0]]


@settings(deadline=None)
@given(groups)
def test_leave_one_out_is_the_mean_over_the_others(sized: tuple[int, list[list[float]]]) -> None:
    size, lists = sized
    returns_BT = returns_of(rows_of(lists))
    left_out_BT = leave_one_out(returns_BT, size)
    for b in range(len(lists)):
        start = b - b % size
        others = [row for row in range(start, start + size) if row != b]
        torch.testing.assert_close(left_out_BT[b], returns_BT[others].mean(dim=0))


@settings(deadline=None)
@given(groups)
def test_a_responses_own_return_does_not_move_its_leave_one_out_baseline(sized: tuple[int, list[list[float]]]) -> None:
    size, lists = sized
    returns_BT = returns_of(rows_of(lists))
    changed_BT = returns_BT.clone()
    changed_BT[0] += 3.0
    torch.testing.assert_close(leave_one_out(changed_BT, size)[0], leave_one_out(returns_BT, size)[0])


@pytest.mark.parametrize(("size", "complaint"), [(1, "at least 2"), (2, "do not make groups of 2")])
def test_leave_one_out_refuses_what_is_no_group(size: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        leave_one_out(torch.zeros(3, 2), size)


def test_the_kl_baseline_is_subtracted_where_it_is_and_not_summed() -> None:
    kl_BT = torch.tensor([[0.5, 0.25]])
    returns_BT = returns_of(rows_of([[1.0, 2.0]]))
    assert (returns_BT - baseline("kl", returns_BT, 1, kl_BT)).tolist() == [[2.5, 1.75]]


def test_the_kl_baseline_without_kl_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the kl"):
        baseline("kl", torch.zeros(1, 1), 1)


@pytest.mark.parametrize("name", ["none", "batch", "leave_one_out", "kl"])
def test_every_baseline_has_the_shape_of_the_returns(name: BaselineName) -> None:
    returns_BT = returns_of(rows_of([[1.0], [1.0, 2.0]]))
    assert baseline(name, returns_BT, 2, torch.zeros(2, 2)).shape == returns_BT.shape


def test_no_baseline_subtracts_nothing() -> None:
    assert not baseline("none", torch.ones(2, 2), 2).any()


def test_the_kl_penalty_is_paid_per_token_and_carries_no_gradient() -> None:
    policy_BT = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    shaped_BT = minus_kl_penalty(torch.tensor([[1.0, 1.0]]), policy_BT, torch.tensor([[-3.0, -1.0]]), 0.5)
    assert shaped_BT.tolist() == [[0.0, 1.5]]
    assert not shaped_BT.requires_grad


@settings(deadline=None)
@given(responses)
def test_whitened_advantages_have_mean_0_and_deviation_1_or_are_all_0(lists: list[list[float]]) -> None:
    mask_BT = mask_of([len(row) for row in lists])
    return_BT = pad(rows_of(lists)).double()
    white_BT = whitened(return_BT, mask_BT, return_BT)
    tokens_N = white_BT[mask_BT > 0]
    assert not white_BT[mask_BT == 0].any()
    if len(tokens_N) and tokens_N.any():
        assert float(tokens_N.mean()) == pytest.approx(0, abs=1e-6)
        assert float(tokens_N.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_advantages_that_differ_by_rounding_alone_teach_nothing() -> None:
    return_BT = torch.tensor([[0.1 + 0.2, 0.7], [0.3, 0.7], [0.3, 0.7]], dtype=torch.float64)
    advantage_BT = return_BT - return_BT.mean(dim=0)
    assert advantage_BT.any()
    assert not whitened(advantage_BT, torch.ones_like(return_BT), return_BT).any()


def test_padding_keeps_every_row_and_adds_0() -> None:
    assert pad(rows_of([[], [1.0, 2.0]])).tolist() == [[0.0, 0.0], [1.0, 2.0]]
    assert mask_of([0, 2]).tolist() == [[0.0, 0.0], [1.0, 1.0]]


@settings(deadline=None)
@given(responses)
def test_the_least_to_go_is_the_minimum_of_what_is_still_to_come(lists: list[list[float]]) -> None:
    rows = rows_of(lists)
    least_BT = least_to_go(pad(rows), mask_of([len(row) for row in rows]))
    for b, row in enumerate(rows):
        assert least_BT[b, : len(row)].tolist() == [float(row[t:].min()) for t in range(len(row))]
        assert not least_BT[b, len(row) :].any()


def test_signals_on_padding_reach_no_minimum() -> None:
    signal_BT = torch.tensor([[1.0, 2.0, 1.5], [2.0, 1.0, torch.nan], [3.0, -torch.inf, -9.0]])
    least_BT = least_to_go(signal_BT, mask_of([3, 2, 1]))
    assert least_BT.tolist() == [[1.0, 1.5, 1.5], [1.0, 1.0, 0.0], [3.0, 0.0, 0.0]]


def test_other_answers_are_found_in_any_order_and_in_groups_of_any_size() -> None:
    returns_BT = torch.tensor([[7.0, 6.0], [1.0, 0.0], [3.0, 0.0], [5.0, 3.0], [1.0, 3.0]], dtype=torch.float64)
    found_BT = minus_other_answers(returns_BT, ["a", "b", "a", "b", "b"])
    assert found_BT.tolist() == [[4.0, 6.0], [-2.0, -3.0], [-4.0, -6.0], [4.0, 1.5], [-2.0, 1.5]]
    with pytest.raises(ValueError, match="at least 2"):
        minus_other_answers(returns_BT, ["a", "b", "a", "b", "c"])
