"""Packed attention against materialised attention in float64, and what it refuses instead of computing it wrong."""

import pytest
import torch
from dense_reward.batching.prefix_trees import Tree
from dense_reward.engines.kernels import block_attention
from dense_reward.engines.kernels.block_attention import BlockRow
from dense_reward.engines.torch import attention
from dense_reward.engines.torch.attention import PackedAttentionError, RowPlan, packed_attention
from dense_reward.engines.torch.model import TorchModel
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_attention import TOLERANCE, Heads, Shape, attended, nested_trees, random_heads, tokens_of, trees_of
from tiny_models import tiny_model
from torch import Tensor, nn

DTYPES = tuple(TOLERANCE)
SIZES = ("QUERY_BLOCK", "ROWS", "FEW_ROWS", "SCORES", "QUERY_STEP", "KEY_STEP")
SHORTEST: tuple[Shape, ...] = ((1, (1, 1)), (1, ()), (3, (1,)), (1, (7, 1)))
UNEQUAL: tuple[Shape, ...] = ((23, (5, 19, 1, 19, 61)), (3, (13, 2)), (11, ()), (40, (2,) * 7))


@pytest.fixture(autouse=True, params=[False, True], ids=["kernel", "blocks"])
def blocks_are_faster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs on which torch's kernel is faster, and such on which blocks of matmuls are."""
    monkeypatch.setattr(attention, "_blocks_are_faster", lambda *_: request.param)


def assert_right(
    heads: Heads,
    trees: tuple[Tree, ...],
    *,
    scaling: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    found, _ = packed_attention(
        nn.Identity(),
        heads.q,
        heads.k,
        heads.v,
        None,
        scaling=scaling,
        plan=RowPlan(trees),
        sliding_window=window,
        softcap=cap,
        s_aux=sinks,
    )
    scale = heads.q.shape[-1] ** -0.5 if scaling is None else scaling
    expected = attended(heads, trees, scale=scale, window=window, cap=cap, sinks_H=sinks)
    assert found.dtype == heads.q.dtype
    torch.testing.assert_close(found[0].double(), expected, atol=TOLERANCE[heads.q.dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("shapes", [SHORTEST, UNEQUAL], ids=["shortest", "unequal"])
def test_every_branch_sees_its_trunk_and_itself(shapes: tuple[Shape, ...], group: int, dtype: torch.dtype) -> None:
    trees = trees_of(*shapes)
    assert_right(random_heads(tokens_of(trees), keys=2, group=group, size=16, dtype=dtype), trees)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 20])
def test_trees_within_trees_see_all_that_precedes_them(window: int | None, dtype: torch.dtype) -> None:
    trees = nested_trees()
    assert max(len(tree.context) for tree in trees) > 1
    heads = random_heads(tokens_of(trees), keys=2, group=2, size=16, dtype=dtype)
    assert_right(heads, trees, window=window)
    assert_right(heads, trees, window=window, cap=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [8, 64, 80, 128, 256])
def test_heads_of_any_size_are_right(size: int, dtype: torch.dtype) -> None:
    trees = trees_of(*UNEQUAL)
    assert_right(random_heads(tokens_of(trees), keys=2, group=2, size=size, dtype=dtype), trees)


@pytest.mark.parametrize("branches", [1, 2, 33, 1024])
def test_any_number_of_branches_share_a_trunk(branches: int) -> None:
    trees = trees_of((9, (2,) * branches))
    assert_right(random_heads(tokens_of(trees), keys=1, group=2, size=8, dtype=torch.float64), trees)


RULES: dict[str, dict[str, float | bool]] = {
    "window of 1": {"window": 1},
    "window within a branch": {"window": 4},
    "window beyond a branch, within a prompt": {"window": 20},
    "window that binds one tree and not another": {"window": 50},
    "window beyond everything": {"window": 1000},
    "cap": {"cap": 1.5},
    "sinks": {"sinks": True},
    "scaling": {"scaling": 0.4},
    "all of it": {"window": 6, "cap": 2.0, "sinks": True, "scaling": 0.3},
}


@pytest.mark.parametrize(
    ("value_size", "dtype"),
    [(8, torch.float64), (24, torch.float64), *((16, dtype) for dtype in DTYPES)],
    ids=str,
)
@pytest.mark.parametrize("name", RULES)
def test_windows_caps_sinks_and_values_of_another_size_are_honoured(
    name: str, value_size: int, dtype: torch.dtype
) -> None:
    rules, trees = dict(RULES[name]), trees_of(*UNEQUAL)
    heads = random_heads(tokens_of(trees), keys=2, group=2, size=16, value_size=value_size, dtype=dtype)
    sinks = torch.linspace(-2, 5, 4, dtype=torch.float64).to(dtype) if rules.pop("sinks", False) else None
    assert_right(heads, trees, sinks=sinks, **rules)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(0, 12), max_size=6).map(tuple)), min_size=1, max_size=3
    ),
    window=st.none() | st.integers(1, 30),
    cap=st.none() | st.floats(0.5, 30),
    sinks=st.booleans(),
    size=st.sampled_from([4, 8, 20]),
    value_size=st.sampled_from([4, 8]),
    group=st.integers(1, 3),
    blocks=st.tuples(*(st.integers(1, most) for most in (9, 20, 20, 500, 5, 9))),
)
def test_any_row_is_right_however_its_scores_are_cut_into_blocks(
    *,
    shapes: list[Shape],
    window: int | None,
    cap: float | None,
    sinks: bool,
    size: int,
    value_size: int,
    group: int,
    blocks: tuple[int, ...],
) -> None:
    trees = trees_of(*shapes)
    heads = random_heads(
        tokens_of(trees), keys=2, group=group, size=size, value_size=value_size, dtype=torch.float64, seed=len(shapes)
    )
    sinks_H = torch.linspace(-1, 3, 2 * group, dtype=torch.float64) if sinks else None
    with pytest.MonkeyPatch.context() as patch:
        for name, at_most in zip(SIZES, blocks, strict=True):
            patch.setattr(block_attention, name, at_most)
        assert_right(heads, trees, window=window, cap=cap, sinks=sinks_H)


def test_a_row_longer_than_a_block_of_queries_is_right_with_a_window_and_without() -> None:
    trees = trees_of((2 * block_attention.QUERY_BLOCK + 30, (block_attention.QUERY_BLOCK + 3, 5)))
    heads = random_heads(tokens_of(trees), keys=1, group=1, size=8, dtype=torch.float64)
    assert_right(heads, trees, cap=4.0)
    assert_right(heads, trees, window=block_attention.QUERY_BLOCK - 7)
    assert_right(heads, trees)


@pytest.mark.parametrize(
    ("length", "size", "rules"),
    [(6, 4, {"cap": 3.0}), (1, 4, {"cap": 3.0}), (6, 1, {"window": 3}), (300, 1, {"cap": 3.0})],
    ids=["scores", "keys of short branches", "behind a window", "fewer queries at once"],
)
def test_no_more_scores_keys_and_values_are_materialised_at_once_than_the_bound(
    length: int, size: int, rules: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    ours = block_attention._product

    def noted(x: Tensor, y: Tensor) -> Tensor:
        found = ours(x, y)
        sizes.append(max(found.numel(), y.numel()))
        return found

    monkeypatch.setattr(block_attention, "_product", noted)
    for name, setting in (("SCORES", 2000), ("QUERY_STEP", 1), ("KEY_STEP", 1)):
        monkeypatch.setattr(block_attention, name, setting)
    trees = trees_of((10, (length,) * (240 // length or 2)))
    heads = random_heads(tokens_of(trees), keys=1, group=2, size=size, dtype=torch.float64)
    assert_right(heads, trees, **rules)  # type: ignore[arg-type]
    assert max(sizes) <= 2000
    assert len(sizes) <= 4 * sum(sizes) / 2000 + 4, "and not many times less"


def test_only_the_trees_that_a_window_binds_need_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_blocks_are_faster", lambda *_: False)
    lengths: list[int] = []
    ours = BlockRow.attend

    def noted(self: BlockRow, tree: Tree) -> None:
        lengths.append(tree.longest_tokens)
        ours(self, tree)

    monkeypatch.setattr(BlockRow, "attend", noted)
    trees = trees_of((9, (4, 5)), (8, (4, 5)), (8, (4, 6)))
    heads = random_heads(tokens_of(trees), keys=1, group=1, size=8, dtype=torch.float64)
    assert_right(heads, trees, window=13)
    assert lengths == [14, 14]


def test_layers_that_ask_are_remembered_by_the_plan() -> None:
    plan, heads = RowPlan(trees_of((2, (1,)))), random_heads(3, keys=1, group=1, size=4, dtype=torch.float32)
    module = nn.Identity()
    for layer in (0, 5):
        module.layer_idx = layer  # type: ignore[assignment]
        packed_attention(module, heads.q, heads.k, heads.v, None, plan=plan)
    assert plan.layers == {0, 5}


def test_without_a_plan_nothing_is_computed() -> None:
    heads = random_heads(3, keys=1, group=1, size=4, dtype=torch.float32)
    with pytest.raises(PackedAttentionError, match="does not pass its forward's arguments to its attention"):
        packed_attention(nn.Identity(), heads.q, heads.k, heads.v, None)
    model = tiny_model()
    TorchModel(model)
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(PackedAttentionError):
        model(input_ids=torch.arange(4)[None])


@pytest.mark.parametrize("given_as", ["attention_mask", "position_bias"])
def test_a_mask_or_a_bias_is_refused_and_not_dropped(given_as: str) -> None:
    heads, plan = random_heads(3, keys=1, group=1, size=4, dtype=torch.float32), RowPlan(trees_of((3, ())))
    given_ = {"attention_mask": None, given_as: torch.zeros(1, 1, 3, 3)}
    with pytest.raises(PackedAttentionError, match="its own mask or bias"):
        packed_attention(nn.Identity(), heads.q, heads.k, heads.v, plan=plan, **given_)  # type: ignore[arg-type]


def test_the_faster_way_is_measured_except_for_small_heads_rare_dtypes_and_deterministic_algorithms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(attention, "block_gain", lambda *shape: asked.append(shape) or 2.0)  # type: ignore[func-returns-value]
    heads = {size: random_heads(9, keys=1, group=2, size=size, dtype=torch.float32) for size in (16, 64)}

    def faster(size: int, dtype: torch.dtype = torch.float32) -> bool:
        return attention._blocks_are_faster(heads[size].q[0].to(dtype), heads[size].k[0].to(dtype))

    assert not faster(16)
    assert not faster(64, torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        assert not faster(64)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not asked
    assert faster(64)
    assert asked == [(2, 1, 64, torch.float32, torch.get_num_threads())]


@pytest.mark.parametrize("dtype", attention.MEASURED, ids=str)
def test_both_ways_are_measured(dtype: torch.dtype) -> None:
    assert 0 < attention.block_gain(2, 1, 32, dtype, 1) < 1000
