"""pass@k, distinct-n and refusals by hand."""

from itertools import combinations

import pytest
from dense_reward_trainer.policies.response_figures import distinct_n, is_refusal, pass_at_k, response_figures
from dense_reward_trainer.rl.held_out_metrics import SampledResponse


def record(text: str, *, right: bool | None = True, greedy: bool = False) -> SampledResponse:
    return SampledResponse("file:1", greedy, text, None, None, right, True, 3)


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_right_one(right: int, k: int) -> None:
    samples = [True] * right + [False] * (5 - right)
    chosen = list(combinations(samples, k))
    assert pass_at_k(5, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_more_samples_than_there_are_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="pass@6 needs at least 6 samples"):
        pass_at_k(5, 1, 6)


def test_distinct_n_counts_words_and_pairs_of_words_over_all_responses() -> None:
    assert distinct_n(["a b a", "b a"], 1) == 2 / 5
    assert distinct_n(["a b a", "b a"], 2) == 2 / 3  # (a, b), (b, a), (b, a)
    assert distinct_n(["a", ""], 2) is None


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("  I\N{RIGHT SINGLE QUOTATION MARK}m sorry, no.", True),
        ("As an AI, I", True),
        ("He says: I cannot", False),
        ("#### 4", False),
    ],
)
def test_a_refusal_is_known_by_its_first_words(text: str, refused: bool) -> None:
    assert is_refusal(text) is refused


def test_figures_are_those_of_the_samples_grouped_by_prompt() -> None:
    greedy = [record("Sorry", greedy=True)] * 2
    first = [record("a b", right=True), record("a b", right=False), record("I cannot", right=False)]
    second = [record("c", right=False)] * 3
    found = response_figures([*greedy, *first, *second], [1, 2, 4])
    assert {k: one.value for k, one in found.pass_at.items()} == pytest.approx({1: 1 / 6, 2: (2 / 3 + 0) / 2})
    assert found.pass_at[1].count == 2
    assert found.refusals.value == pytest.approx(1 / 6)
    assert found.distinct_1 == 5 / 9
    chosen = response_figures([record("a", right=True), record("b", right=None)], [1])
    assert (chosen.pass_at[1].value, chosen.pass_at[1].count) == (1.0, 1)
    assert response_figures([record("a", right=None)], [1]).pass_at == {}
