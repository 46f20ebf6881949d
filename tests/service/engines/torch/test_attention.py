"""Packed attention against materialised attention in float64, and what it refuses instead of computing it wrong."""

import pytest
import torch
from dense_reward.batching.prefix_trees import Tree
from dense_reward.engines.torch import attention
from dense_reward.engines.torch.attention import PackedAttentionError, RowPlan, packed_attention
from dense_reward.engines.torch.model import TorchModel
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_attention import TOLERANCE, Heads, Shape, attended, nested_trees, random_heads, tokens_of, trees_of
from tiny_models import tiny_model
from torch import Tensor, nn

DTYPES = tuple(TOLERANCE)
SHORTEST: tuple[Shape, ...] = ((1, (1, 1)), (1, ()), (3, (1,)), (1, (7, 1)))
UNEQUAL: tuple[Shape, ...] = ((23, (5, 19, 1, 19, 61)), (3, (13, 2)), (11, ()), (40, (2,) * 7))


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
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 500)),
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
    blocks: tuple[int, int],
) -> None:
    trees = trees_of(*shapes)
    heads = random_heads(
        tokens_of(trees), keys=2, group=group, size=size, value_size=value_size, dtype=torch.float64, seed=len(shapes)
    )
    sinks_H = torch.linspace(-1, 3, 2 * group, dtype=torch.float64) if sinks else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", blocks[0])
        patch.setattr(attention, "SCORES", blocks[1])
        assert_right(heads, trees, window=window, cap=cap, sinks=sinks_H)


def test_a_row_longer_than_a_block_of_queries_is_right_with_a_window_and_without() -> None:
    trees = trees_of((2 * attention.QUERY_BLOCK + 30, (attention.QUERY_BLOCK + 3, 5)))
    heads = random_heads(tokens_of(trees), keys=1, group=1, size=8, dtype=torch.float64)
    assert_right(heads, trees, cap=4.0)
    assert_right(heads, trees, window=attention.QUERY_BLOCK - 7)
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
    ours = attention._materialised

    def noted(q: Tensor, k: Tensor, v: Tensor, before: int, rules: attention.LayerRules) -> Tensor:
        sizes.append(k.shape[2] * len(q) * q.shape[1] * max(q.shape[2], q.shape[3]))
        return ours(q, k, v, before, rules)

    monkeypatch.setattr(attention, "_materialised", noted)
    monkeypatch.setattr(attention, "SCORES", 2000)
    trees = trees_of((10, (length,) * (240 // length or 2)))
    heads = random_heads(tokens_of(trees), keys=1, group=2, size=size, dtype=torch.float64)
    assert_right(heads, trees, **rules)  # type: ignore[arg-type]
    assert max(sizes) <= 2000
    assert len(sizes) <= 4 * sum(sizes) / 2000 + 2, "and not many times less"


def test_only_the_trees_that_a_window_binds_are_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    ours = attention._materialised_tree

    def noted(row: attention.LayerTensors, tree: Tree, rules: attention.LayerRules) -> None:
        lengths.append(tree.longest_tokens)
        ours(row, tree, rules)

    monkeypatch.setattr(attention, "_materialised_tree", noted)
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
