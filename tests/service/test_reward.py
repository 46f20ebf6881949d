"""Each quantity equals its definition, and the identities between them hold for any log-probs."""

from itertools import pairwise, product

import numpy as np
import pytest
from dense_reward.records import FloatArray, TokenScores
from dense_reward.reward import (
    Signal,
    Summary,
    all_finite,
    centred,
    return_to_go,
    reward,
    segment_sums,
    signal,
    summarise,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

NATS = st.floats(-64, 64, width=32)
VALUES = arrays(np.float32, st.integers(0, 40), elements=NATS)
EPSILON = float(np.finfo(np.float32).eps)


def floats(*values: float) -> FloatArray:
    return np.array(values, dtype=np.float32)


def rounding(values_S: FloatArray) -> float:
    """The largest rounding error of a float32 result that sums these values."""
    return 2 * EPSILON * float(np.abs(values_S, dtype=np.float64).sum() + 1)


@given(st.integers(0, 20), st.data())
def test_the_sum_of_rewards_is_the_log_ratio_of_the_response(size: int, data: st.DataObject) -> None:
    sft_S, reference_S = (data.draw(arrays(np.float32, size, elements=NATS)) for _ in range(2))
    total = summarise(reward(TokenScores(sft_S, reference_S))).sum
    exact = float(sft_S.sum(dtype=np.float64) - reference_S.sum(dtype=np.float64))
    assert total == pytest.approx(exact, abs=rounding(sft_S) + rounding(reference_S))


@given(VALUES)
def test_identical_checkpoints_give_exactly_0(logprob_S: FloatArray) -> None:
    scores = TokenScores(logprob_S, logprob_S.copy(), kl_S=np.zeros_like(logprob_S))
    for values_S in (reward(scores), centred(scores), return_to_go(reward(scores)), return_to_go(reward(scores), 0.5)):
        assert values_S.tolist() == [0.0] * len(logprob_S)
    assert summarise(reward(scores)).sum == 0.0


def test_each_signal_is_its_formula() -> None:
    scores = TokenScores(floats(-1, -2), floats(-3, -1), kl_S=floats(0.5, 0.25))
    expected: dict[Signal, list[float]] = {"reward": [2, -1], "centred": [1.5, -1.25], "sft_logprob": [-1, -2]}
    for name, values in expected.items():
        assert signal(name, scores).tolist() == values
        assert signal(name, scores).dtype == np.float32


def test_centred_rewards_without_kl_are_refused() -> None:
    with pytest.raises(ValueError, match="need kl: set kl in the Wants"):
        centred(TokenScores(floats(-1), floats(-2)))


@given(VALUES, st.sampled_from([0.0, 0.5, 0.97, 1.0]) | st.floats(0, 1))
def test_return_to_go_is_the_discounted_sum_of_what_follows(values_S: FloatArray, gamma: float) -> None:
    returns_S = return_to_go(values_S, gamma)
    assert returns_S.dtype == np.float32
    assert returns_S.shape == values_S.shape
    for t in range(len(values_S)):
        brute = sum(gamma ** (k - t) * float(values_S[k]) for k in range(t, len(values_S)))
        assert returns_S[t] == pytest.approx(brute, abs=rounding(values_S))


@given(VALUES)
def test_the_discount_spans_from_the_next_reward_alone_to_all_of_them(values_S: FloatArray) -> None:
    assert return_to_go(values_S, 0.0).tolist() == values_S.tolist()
    if len(values_S):
        assert return_to_go(values_S)[0] == np.float32(summarise(values_S).sum)
        assert return_to_go(values_S)[-1] == values_S[-1]


def test_long_returns_lose_nothing_to_float32_accumulation() -> None:
    values_S = np.full(100_000, 0.1, dtype=np.float32)
    exact = float(values_S[0]) * 100_000
    assert return_to_go(values_S)[0] == np.float32(exact)
    assert summarise(values_S).sum == pytest.approx(exact, rel=1e-12)


@given(VALUES, st.data())
def test_segments_sum_the_signal_over_half_open_spans(values_S: FloatArray, data: st.DataObject) -> None:
    ends = st.integers(0, len(values_S))
    spans = [tuple(sorted(span)) for span in data.draw(st.lists(st.tuples(ends, ends)))]
    sums_S = segment_sums(values_S, [(start, end) for start, end in spans])
    assert sums_S.dtype == np.float32
    assert len(sums_S) == len(spans)
    for found, (start, end) in zip(sums_S, spans, strict=True):
        exact = float(values_S[start:end].sum(dtype=np.float64))
        assert found == pytest.approx(exact, abs=rounding(values_S))


@given(VALUES.filter(len), st.data())
def test_segments_that_cut_a_response_add_up_to_it(values_S: FloatArray, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values_S)))))
    bounds = [0, *cuts, len(values_S)]
    sums = segment_sums(values_S, list(pairwise(bounds)))
    tolerance = len(bounds) * rounding(values_S)
    assert float(sums.sum(dtype=np.float64)) == pytest.approx(summarise(values_S).sum, abs=tolerance)


def test_an_empty_response_sums_to_0_and_has_neither_mean_nor_min() -> None:
    assert summarise(floats()) == Summary(0.0, None, None)
    assert return_to_go(floats()).shape == return_to_go(floats(), 0.5).shape == (0,)
    assert segment_sums(floats(), [(0, 0)]).tolist() == [0.0]
    assert segment_sums(floats(1), []).shape == (0,)


@given(VALUES.filter(len))
def test_summaries_are_sum_mean_and_min(values_S: FloatArray) -> None:
    summary = summarise(values_S)
    assert summary.sum == pytest.approx(float(values_S.sum(dtype=np.float64)))
    assert summary.mean == pytest.approx(float(values_S.mean(dtype=np.float64)))
    assert summary.min == values_S.min()


def test_numbers_that_are_not_finite_are_found() -> None:
    assert all_finite([floats(1, 2), None, np.zeros((0, 3), dtype=np.float32)])
    for number in (np.nan, np.inf, -np.inf):
        assert not all_finite([floats(1), None, floats(0, number)])


# A language model read as a soft Q-function, tested on every response of a tiny tree.
VOCABULARY, HORIZON = 3, 4
State = tuple[int, ...]


@pytest.fixture(scope="module")
def q_of_state() -> dict[State, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Logits Q(s, .) of every state that is not the end."""
    random = np.random.default_rng(0)
    states = [state for length in range(HORIZON) for state in product(range(VOCABULARY), repeat=length)]
    return {state: 2 * random.normal(size=VOCABULARY) for state in states}


def test_log_probabilities_are_soft_q_values_shaped_by_a_potential(
    q_of_state: dict[State, np.ndarray[tuple[int], np.dtype[np.float64]]],
) -> None:
    value = {state: float(np.logaddexp.reduce(q_V)) for state, q_V in q_of_state.items()}

    def value_of(state: State) -> float:
        return value.get(state, 0.0)  # V(end) = 0

    for response in product(range(VOCABULARY), repeat=HORIZON):
        states = [response[:t] for t in range(HORIZON)]
        logprobs = [float(q_of_state[s][a] - value[s]) for s, a in zip(states, response, strict=True)]
        rewards = [float(q_of_state[s][a]) - value_of((*s, a)) for s, a in zip(states, response, strict=True)]
        shaped = [q + value_of((*s, a)) - value[s] for q, s, a in zip(rewards, states, response, strict=True)]
        assert logprobs == pytest.approx(shaped, abs=1e-12)
        scores = TokenScores(floats(*logprobs), floats(*[0.0] * HORIZON))
        returns = return_to_go(signal("sft_logprob", scores))
        of_rewards = return_to_go(floats(*rewards))
        for t, state in enumerate(states):
            assert returns[t] == pytest.approx(of_rewards[t] - value[state], abs=1e-5)
