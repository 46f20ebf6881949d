"""Rows without padding: every scored token is predicted once from exactly the tokens before it."""

from collections.abc import Sequence

import numpy as np
import pytest
from dense_reward.batching import packing
from dense_reward.batching.packing import Leaf, Packed, computed_tokens, leaves, pack
from dense_reward.batching.prefix_trees import SHARED_LEAST, Stretch, Tree
from dense_reward.records import Branch, Trunk
from hypothesis import given, settings
from hypothesis import strategies as st

ENDLESS = 1 << 30
bits = st.lists(st.integers(0, 1), max_size=6)


@pytest.fixture(params=[1, 3, SHARED_LEAST], autouse=True)
def _least(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many common tokens become a tree; with few, the short sequences of these tests have trees within trees."""
    monkeypatch.setattr(packing, "SHARED_LEAST", request.param)


@st.composite
def trunk(draw: st.DrawFn) -> Trunk:
    """Ids are 0 or 1, so that some prompts of a batch are equal, and some are the start of another."""
    branches = []
    for ids in draw(st.lists(bits, max_size=5)):
        scored = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        branches.append(Branch(np.array(ids, dtype=np.int32), np.array(scored, dtype=bool)))
    prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=4))
    return Trunk(np.array(prompt, dtype=np.int32), tuple(branches))


trunks_of_a_batch = st.lists(trunk(), max_size=5)
budgets = st.integers(1, 40) | st.just(ENDLESS)
limits_of_models = st.sets(st.integers(1, 9), max_size=2)
thoroughly = settings(deadline=None, max_examples=100)


Ids = np.ndarray[tuple[int], np.dtype[np.int32]]


def whole(prompt: int, *lengths: int, first_id: int = 0) -> Trunk:
    """A prompt and branches that are scored whole; all ids are different."""
    ids = iter(range(first_id, 1 << 20))

    def some(count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array([next(ids) for _ in range(count)], dtype=np.int32)

    start = some(prompt)
    return Trunk(start, tuple(Branch(some(n), np.ones(n, dtype=bool)) for n in lengths))


def seen_by(row: int, trees: Sequence[Tree]) -> list[int]:
    """The indices that index `row` attends to according to the trees, in logical order, itself last."""
    tree = [tree for tree in trees if tree.start <= row][-1]
    before = [token for part in tree.context for token in range(*part)]
    if row < tree.start + tree.tokens:
        return [*before, *range(tree.start, row + 1)]
    stretch = [stretch for stretch in tree.branches if stretch.start <= row][-1]
    start = row - (row - stretch.start) % stretch.length
    return [*before, *range(*tree.trunk), *range(start, row + 1)]


def distinct(leaves: Sequence[Leaf]) -> int:
    """The number of tokens of some sequences that differ in their id or in what precedes them."""
    return len({leaf.sequence_L[: end + 1].tobytes() for leaf in leaves for end in range(len(leaf.sequence_L))})


def scored_branches(trunks: Sequence[Trunk]) -> list[tuple[int, int]]:
    return [(t, b) for t, of in enumerate(trunks) for b, branch in enumerate(of.branches) if branch.scored_T.any()]


@thoroughly
@given(trunks_of_a_batch, budgets, limits_of_models, st.booleans())
def test_a_scored_token_is_predicted_once_by_a_row_that_sees_what_stands_before_it_and_nothing_else(
    trunks: list[Trunk], max_tokens: int, rope_length_limits: set[int], alone: bool
) -> None:
    found = []
    for packed in pack(trunks, max_tokens=max_tokens, rope_length_limits=rope_length_limits, alone=alone):
        tokens = [(leaf, int(s)) for leaf in packed.leaves for s in leaf.scored_S]
        assert len(packed.row_S) == len(tokens)
        for (leaf, s), entry in zip(tokens, packed.row_S, strict=True):
            seen = seen_by(int(packed.rows_R[entry]), packed.trees)
            source = trunks[leaf.trunk]
            before = np.concatenate([source.prompt_P, source.branches[leaf.branch].ids_T[:s]])
            assert packed.ids_N[seen].tolist() == before.tolist()
            assert packed.positions_N[seen].tolist() == list(range(len(before)))
            found.append((leaf.trunk, leaf.branch, s))
    asked = [(t, b, int(s)) for t, b in scored_branches(trunks) for s in np.flatnonzero(trunks[t].branches[b].scored_T)]
    assert sorted(found) == asked


@thoroughly
@given(trunks_of_a_batch, budgets, limits_of_models)
def test_trees_and_their_stretches_lie_one_behind_another_without_gaps(
    trunks: list[Trunk], max_tokens: int, rope_length_limits: set[int]
) -> None:
    for packed in pack(trunks, max_tokens=max_tokens, rope_length_limits=rope_length_limits):
        at = 0
        for tree in packed.trees:
            assert tree.start == at
            at += tree.tokens
            for stretch in tree.branches:
                assert stretch.start == at
                assert min(stretch.count, stretch.length) > 0
                at += stretch.count * stretch.length
            lengths = [stretch.length for stretch in tree.branches]
            assert lengths == sorted(set(lengths)), "branches of one length are one stretch"
            before = sum(stop - start for start, stop in tree.context)
            assert all(0 <= start < stop <= tree.start for start, stop in tree.context)
            assert tree.longest_tokens == before + tree.tokens + max(lengths, default=0)
            continued = any(tree.trunk[1] in {stop for _, stop in other.context} for other in packed.trees)
            single = sum(stretch.count for stretch in tree.branches) == 1
            assert not single or continued, "a single branch is the trunk's continuation"
        assert len(packed.ids_N) == len(packed.positions_N) == at


@thoroughly
@given(trunks_of_a_batch, budgets, limits_of_models)
def test_a_row_holds_each_beginning_once_and_of_a_branch_what_is_needed(
    trunks: list[Trunk], max_tokens: int, rope_length_limits: set[int]
) -> None:
    for packed in pack(trunks, max_tokens=max_tokens, rope_length_limits=rope_length_limits):
        prompts = {leaf.prompt_P.tobytes(): len(leaf.prompt_P) for leaf in packed.leaves}
        assert len(packed.ids_N) <= sum(prompts.values()) + sum(leaf.computed_tokens for leaf in packed.leaves)
        if packing.SHARED_LEAST == 1:  # type: ignore[attr-defined]
            assert len(packed.ids_N) == distinct(packed.leaves)


@thoroughly
@given(trunks_of_a_batch)
def test_where_everything_fits_every_prompt_of_a_batch_is_computed_once(trunks: list[Trunk]) -> None:
    rows = pack(trunks, max_tokens=ENDLESS)
    scored = scored_branches(trunks)
    assert len(rows) == bool(scored)
    prompts = {trunks[t].prompt_P.tobytes(): len(trunks[t].prompt_P) for t, _ in scored}
    last_scored = [int(np.flatnonzero(trunks[t].branches[b].scored_T)[-1]) for t, b in scored]
    assert sum(len(row.ids_N) for row in rows) <= sum(prompts.values()) + sum(last_scored)


@thoroughly
@given(trunks_of_a_batch, budgets, limits_of_models)
def test_a_row_has_no_more_tokens_than_it_may_unless_it_is_one_sequence(
    trunks: list[Trunk], max_tokens: int, rope_length_limits: set[int]
) -> None:
    for packed in pack(trunks, max_tokens=max_tokens, rope_length_limits=rope_length_limits):
        assert len(packed.ids_N) <= max_tokens or len(packed.leaves) == 1


@thoroughly
@given(trunks_of_a_batch, budgets, st.sets(st.integers(1, 9), min_size=1, max_size=2))
def test_sequences_of_a_row_are_on_one_side_of_every_border_whole_and_as_they_are_computed(
    trunks: list[Trunk], max_tokens: int, rope_length_limits: set[int]
) -> None:
    for packed in pack(trunks, max_tokens=max_tokens, rope_length_limits=rope_length_limits):
        lengths = [len(leaf.prompt_P) + len(leaf.source.ids_T) for leaf in packed.leaves]
        computed = [len(leaf.prompt_P) + leaf.computed_tokens for leaf in packed.leaves]
        for limit in rope_length_limits:
            assert len({length > limit for length in lengths + computed}) == 1
            assert (packed.positions_N.max() >= limit) == (lengths[0] > limit)


@thoroughly
@given(trunks_of_a_batch, budgets, limits_of_models)
def test_alone_a_sequence_is_laid_out_as_if_nothing_else_had_been_asked(
    trunks: list[Trunk], max_tokens: int, rope_length_limits: set[int]
) -> None:
    rows = pack(trunks, max_tokens=max_tokens, rope_length_limits=rope_length_limits, alone=True)
    assert sorted((leaf.trunk, leaf.branch) for row in rows for leaf in row.leaves) == scored_branches(trunks)
    for row in rows:
        (leaf,) = row.leaves
        single = Trunk(leaf.prompt_P, (leaf.source,))
        assert_same_layout(row, *pack([single], max_tokens=ENDLESS, rope_length_limits=rope_length_limits))
        assert not row.trees[0].branches


def assert_same_layout(row: Packed, other: Packed) -> None:
    assert row.trees == other.trees
    for name in ("ids_N", "positions_N", "rows_R", "row_S"):
        assert np.array_equal(getattr(row, name), getattr(other, name)), name


@thoroughly
@given(trunks_of_a_batch, budgets)
def test_a_row_meets_the_output_layer_once_however_many_tokens_it_predicts(
    trunks: list[Trunk], max_tokens: int
) -> None:
    for packed in pack(trunks, max_tokens=max_tokens):
        assert len(set(packed.rows_R.tolist())) == len(packed.rows_R)
        assert set(packed.row_S.tolist()) == set(range(len(packed.rows_R)))


def test_a_row_reads_like_this() -> None:
    """Prompt 0 1 2 with branches 3 4 5, 6 7 8 and 9. The last token of each branch is only predicted."""
    (packed,) = pack([whole(3, 3, 3, 1)], max_tokens=ENDLESS)
    assert packed.ids_N.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert packed.positions_N.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert packed.trees == (Tree(0, 3, (Stretch(3, 2, 2),)),)
    assert [leaf.branch for leaf in packed.leaves] == [2, 0, 1]
    assert packed.rows_R[packed.row_S].tolist() == [2, 2, 3, 4, 2, 5, 6]
    assert packed.rows_R.tolist() == [2, 3, 4, 5, 6]


def test_equal_prompts_of_different_trunks_become_one_tree_and_find_back_to_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "SHARED_LEAST", SHARED_LEAST)  # two of the branches begin alike
    first, second, other = whole(3, 2, 4), whole(3, 2), whole(4, 2, first_id=50)
    (packed,) = pack([first, other, second], max_tokens=ENDLESS)
    assert [tree.tokens for tree in packed.trees] == [3, 5]
    assert packed.trees[0].branches == (Stretch(3, 2, 1), Stretch(5, 1, 3))
    assert [(leaf.trunk, leaf.branch) for leaf in packed.leaves] == [(0, 0), (2, 0), (0, 1), (1, 0)]


def test_turns_of_conversations_with_one_system_prompt_are_computed_once() -> None:
    """System prompt S. One chat is S A B C, another is S D; their turns are scored by five requests."""
    ids = np.arange(500, dtype=np.int32)
    system, a, b, c, d = ids[:40], ids[100:120], ids[200:230], ids[300:310], ids[400:420]

    def turn(*parts: Ids) -> Trunk:
        *prompt, response = parts
        return Trunk(np.concatenate(prompt), (Branch(response, np.ones(len(response), dtype=bool)),))

    asked = [turn(system, a, b), turn(system, d), turn(system, a, b, c), turn(system, a), turn(system, d)]
    (packed,) = pack(asked, max_tokens=ENDLESS)
    assert packed.trees == (Tree(0, 40, (Stretch(40, 1, 19), Stretch(59, 1, 59))),)
    assert distinct(packed.leaves) == 40 + 19 + 59
    assert packed.ids_N.tolist() == [*system, *d[:-1], *a, *b, *c[:-1]]


def test_a_tree_within_a_tree_reads_like_this() -> None:
    """Two prompts begin with 0 to 19; the first has three branches, and a third prompt shares nothing."""
    common, other = np.arange(20, dtype=np.int32), whole(3, 2, first_id=900)
    one, two = np.append(common, 100), np.append(common, 200)
    branches = tuple(Branch(np.full(3, i, dtype=np.int32), np.ones(3, dtype=bool)) for i in (301, 302))
    (packed,) = pack([Trunk(one, branches), Trunk(two, branches[:1]), other], max_tokens=ENDLESS)
    assert packed.trees == (
        Tree(0, 20, (Stretch(20, 1, 3),)),
        Tree(23, 1, (Stretch(24, 2, 2),), context=((0, 20),)),
        Tree(28, 4, ()),
    )
    assert packed.positions_N.tolist() == [*range(20), 20, 21, 22, 20, 21, 22, 21, 22, 0, 1, 2, 3]


def test_thousands_of_turns_are_laid_out_without_recursion() -> None:
    ids, ends = np.arange(40_000, dtype=np.int32) % 500, range(10, 40_000, 20)
    turns = [Trunk(ids[:end], (Branch(ids[end : end + 5][::-1].copy(), np.ones(5, dtype=bool)),)) for end in ends]
    (packed,) = pack(turns, max_tokens=ENDLESS)
    assert len(packed.ids_N) <= 40_000 + 4 * len(ends)


def test_a_prompt_whose_branches_do_not_fit_is_in_every_row_that_needs_it() -> None:
    rows = pack([whole(5, 4, 4, 4)], max_tokens=11)
    assert [len(row.ids_N) for row in rows] == [11, 8]
    assert [row.ids_N[:5].tolist() for row in rows] == [list(range(5))] * 2


@pytest.mark.parametrize(
    ("prompt", "scored", "rope_length_limits", "computed"),
    [
        (3, [], (), 0),
        (3, [False, False], (), 0),
        (3, [True], (), 0),
        (3, [False, True], (), 1),
        (3, [True, False, False], (), 0),
        (3, [True, True, False, True, False], (), 3),
        (3, [False, True, False], (9,), 1),
        (3, [False, True, False], (5,), 3),
        (3, [False, True, False], (4,), 3),
        (3, [False, True, False], (6,), 1),
        (3, [False, True, False], (3,), 1),
        (3, [False, False, False], (4,), 0),
    ],
)
def test_what_is_computed_of_a_branch_ends_before_its_last_scored_token_but_not_short_of_a_border(
    prompt: int, scored: list[bool], rope_length_limits: tuple[int, ...], computed: int
) -> None:
    branch = Branch(np.arange(len(scored), dtype=np.int32), np.array(scored, dtype=bool))
    assert computed_tokens(prompt, branch, rope_length_limits) == computed


def test_nothing_to_score_is_no_row() -> None:
    assert pack([], max_tokens=5) == []
    assert pack([whole(3), whole(3, 0)], max_tokens=5) == []
    assert leaves([whole(3, 0)]) == []
