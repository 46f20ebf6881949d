import hashlib

import pytest
from dense_reward_trainer.data.sources import ChatMessage, Demonstration, data_sha256, split
from hypothesis import given
from hypothesis import strategies as st

messages = st.builds(ChatMessage, st.sampled_from(["system", "user", "assistant", "tool"]), st.text("ab", max_size=2))
demonstrations_of_few_prompts = st.builds(
    lambda prompt, response, source: Demonstration((*prompt, ChatMessage("assistant", response)), None, source),
    st.lists(messages, min_size=1, max_size=2),
    st.text("xy", min_size=1, max_size=3),
    st.text("pq", max_size=3),
)
sets = st.lists(demonstrations_of_few_prompts, max_size=30)
fractions = st.floats(0, 1, exclude_max=True)


@given(sets, fractions, st.integers())
def test_the_split_keeps_every_demonstration_once_in_order_and_no_prompt_on_both_sides(
    demonstrations: list[Demonstration], fraction: float, seed: int
) -> None:
    sides = split(demonstrations, fraction, seed)
    held_out_prompts = {demonstration.prompt_messages for demonstration in sides.held_out}
    assert sides.train == tuple(d for d in demonstrations if d.prompt_messages not in held_out_prompts)
    assert sides.held_out == tuple(d for d in demonstrations if d.prompt_messages in held_out_prompts)


@given(sets, sets, fractions, st.integers())
def test_the_side_of_a_demonstration_depends_on_neither_the_order_nor_the_others(
    demonstrations: list[Demonstration], others: list[Demonstration], fraction: float, seed: int
) -> None:
    alone = split(demonstrations, fraction, seed)
    among = split([*others, *reversed(demonstrations)], fraction, seed)
    assert set(alone.train) <= set(among.train)
    assert set(alone.held_out) <= set(among.held_out)
    assert set(among.train).isdisjoint(among.held_out)


@given(sets, fractions, fractions, st.integers())
def test_a_larger_fraction_only_moves_prompts_to_the_held_out_side(
    demonstrations: list[Demonstration], one: float, other: float, seed: int
) -> None:
    fewer, more = (split(demonstrations, fraction, seed) for fraction in sorted((one, other)))
    assert set(fewer.held_out) <= set(more.held_out)
    assert set(more.train) <= set(fewer.train)


def numbered_prompts(count: int) -> list[Demonstration]:
    return [
        Demonstration((ChatMessage("user", f"{n}?"), ChatMessage("assistant", "x")), None, f"f:{n}")
        for n in range(count)
    ]


@pytest.mark.parametrize(("fraction", "fewest", "most"), [(0.0, 0, 0), (0.1, 150, 250), (0.5, 900, 1100)])
def test_the_held_out_fraction_is_met_in_expectation(fraction: float, fewest: int, most: int) -> None:
    for seed in range(3):
        assert fewest <= len(split(numbered_prompts(2000), fraction, seed).held_out) <= most


def test_the_seed_decides_which_prompts_are_held_out() -> None:
    demonstrations = numbered_prompts(200)
    assert split(demonstrations, 0.5, 1) == split(demonstrations, 0.5, 1)
    assert split(demonstrations, 0.5, 1) != split(demonstrations, 0.5, 2)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="must be at least 0 and below 1"):
        split([], fraction, 0)


ONE = Demonstration((ChatMessage("user", "a"), ChatMessage("assistant", "b")), None, "f:1")
OTHERS = [
    Demonstration((ChatMessage("user", "a"), ChatMessage("assistant", "c")), None, "f:1"),
    Demonstration((ChatMessage("system", "a"), ChatMessage("assistant", "b")), None, "f:1"),
    Demonstration((ChatMessage("user", "a"), ChatMessage("assistant", "b")), "b", "f:1"),
    Demonstration((ChatMessage("user", "a"), ChatMessage("user", "b"), ChatMessage("assistant", "b")), None, "f:1"),
]


@pytest.mark.parametrize("other", OTHERS)
def test_the_data_hash_changes_with_roles_texts_answers_order_and_number(other: Demonstration) -> None:
    hashes = [
        data_sha256(demonstrations) for demonstrations in ([ONE], [other], [ONE, other], [other, ONE], [ONE, ONE])
    ]
    assert len(set(hashes)) == 5


def test_the_data_hash_is_a_known_value_that_does_not_depend_on_the_place() -> None:
    canonical = b'[[["user","a"],["assistant","b"]],null]\n'
    moved = Demonstration(ONE.messages, ONE.answer, "elsewhere:9")
    assert data_sha256([ONE]) == data_sha256([moved]) == hashlib.sha256(canonical).hexdigest()
