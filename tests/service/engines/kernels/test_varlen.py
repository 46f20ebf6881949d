"""Kernels for sequences of variable length: their arguments, and attention over the gathered keys."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from dense_reward.batching.prefix_trees import Tree
from dense_reward.engines.kernels import varlen
from dense_reward.engines.kernels.varlen import Call, varlen_attention, varlen_of
from dense_reward.engines.torch.attention import RowPlan, packed_attention
from reference_attention import TOLERANCE, Heads, Shape, attended, nested_trees, random_heads, tokens_of
from reference_attention import trees_of as trees_of_shapes
from torch import Tensor, nn

CPU = torch.device("cpu")
NESTED: tuple[Shape, ...] = ()
"""Stands for `nested_trees`."""
ROWS: dict[str, tuple[Shape, ...]] = {
    "one sequence": ((7, ()),),
    "one branch": ((7, (3,)),),
    "prompts alone": ((7, ()), (1, ()), (4, (2,))),
    "branches of one tree": ((5, (3, 3, 1)),),
    "trees within trees": NESTED,
    "trees with branches and without": ((9, ()), (23, (5, 19, 1, 19, 40)), (3, (1,)), (1, (1, 1)), (4, (2,) * 30)),
}
RULES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window 1": {"window": 1},
    "window 6": {"window": 6},
    "window 1000": {"window": 1000},
    "sinks": {"sinks_H": torch.linspace(-2, 3, 8)},
    "sinks and window 6": {"window": 6, "sinks_H": torch.linspace(-2, 3, 8)},
}


def kernel(heads: varlen.Heads, call: Call, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """flash-attn's and torch's kernel in plain torch: causal, the mask aligned at the bottom right."""
    q, k, v = heads
    queries, keys = (end.ends.tolist() for end in (call.queries, call.keys))
    for end in (call.queries, call.keys):
        assert end.ends.dtype == torch.int32
        assert end.longest == int(end.ends.diff().max())
    assert (queries[-1], keys[-1]) == (len(q), len(k))
    assert all(x.stride(-1) == 1 for x in heads)
    out, lse_HQ = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for i in range(len(queries) - 1):
        at, of = slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])
        key, value = (x[of].float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores_HTS = torch.einsum("thd,shd->hts", q[at].float(), key) * scale
        distance_TS = torch.arange(len(q[at]))[:, None] + len(key) - len(q[at]) - torch.arange(len(key))
        hidden_TS = (distance_TS < 0) | (distance_TS >= (window or len(key)))
        scores_HTS = scores_HTS.masked_fill(hidden_TS, -torch.inf)
        out[at] = torch.einsum("hts,shd->thd", scores_HTS.softmax(2), value).to(q.dtype)
        lse_HQ[:, at] = scores_HTS.logsumexp(2)
    return out, lse_HQ


def trees_of(*shapes: Shape) -> tuple[Tree, ...]:
    return trees_of_shapes(*shapes) if shapes else nested_trees()


@pytest.fixture
def reference_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: kernel)


@pytest.fixture
def looked_up_again() -> Iterator[None]:
    """The installed kernel is looked up again: the lookup is cached for the process."""
    varlen._kernel.cache_clear()
    yield
    varlen._kernel.cache_clear()


def plans_output(heads: Heads, trees: tuple[Tree, ...], **rules: float) -> Tensor:
    plan = RowPlan(trees, varlen_of(trees, CPU))
    return packed_attention(nn.Identity(), heads.q, heads.k, heads.v, None, plan=plan, **rules)[0][0]  # type: ignore[arg-type]


@pytest.mark.usefixtures("reference_kernel")
@pytest.mark.parametrize("keys_at_once", [1 << 17, 40], ids=["one call", "many calls"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_attention_over_trunk_and_branch(
    name: str, rule: str, keys_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "KEYS", keys_at_once)
    trees = trees_of(*ROWS[name])
    for dtype in (torch.bfloat16, torch.float16):
        heads = random_heads(tokens_of(trees), keys=2, group=4, size=16, dtype=dtype)
        found = varlen_attention(heads.plain, varlen_of(trees, CPU), scale=0.2, **RULES[rule])
        assert found is not None
        assert found.dtype == dtype
        expected = attended(heads, trees, scale=0.2, **RULES[rule])
        torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=0)


def test_the_keys_of_a_call_are_bounded_unless_one_sequence_has_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "KEYS", 20)
    trees = trees_of((9, ()), (10, (3, 9, 9, 30)))
    row = varlen_of(trees, CPU)
    assert [int(call.keys.ends[-1]) for call in row] == [19, 13, 19, 19, 40]
    assert [(call.part.start, call.part.stop) for call in row] == [(0, 19), (19, 22), (22, 31), (31, 40), (40, 70)]


@pytest.mark.usefixtures("reference_kernel")
@pytest.mark.parametrize("name", ROWS)
def test_the_kernels_of_a_device_give_what_those_of_the_cpu_give(name: str) -> None:
    trees = trees_of(*ROWS[name])
    heads = random_heads(tokens_of(trees), keys=2, group=2, size=16, dtype=torch.float16)
    theirs = plans_output(heads, trees)
    ours = packed_attention(nn.Identity(), heads.q, heads.k, heads.v, None, plan=RowPlan(trees))[0][0]
    torch.testing.assert_close(theirs, ours, atol=TOLERANCE[torch.float16], rtol=0)


def test_a_call_names_the_tokens_of_each_key() -> None:
    (call,) = varlen_of(trees_of((2, ()), (3, (2, 1, 2)), (1, (1, 4))), CPU)
    assert (call.part.start, call.part.stop) == (0, 16)
    assert call.queries.ends.tolist() == [0, 2, 5, 6, 8, 10, 11, 12, 16]
    assert call.keys.ends.tolist() == [0, 2, 5, 9, 14, 19, 20, 22, 27]
    assert (call.queries.longest, call.keys.longest) == (4, 5)
    assert call.key_K is not None
    tree = [[2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 6, 7], [2, 3, 4, 8, 9]]
    assert call.key_K.tolist() == [*chain([0, 1], *tree, [10], [10, 11], [10, 12, 13, 14, 15])]


def test_without_branches_no_key_is_copied() -> None:
    (call,) = varlen_of(trees_of((7, ()), (4, (2,))), CPU)
    assert call.key_K is None


@pytest.mark.usefixtures("reference_kernel")
@pytest.mark.parametrize(
    ("size", "dtype"), [(8, torch.float32), (8, torch.float64), (264, torch.float16), (12, torch.float16)], ids=str
)
def test_what_no_kernel_computes_is_left_to_others(size: int, dtype: torch.dtype) -> None:
    trees = trees_of((4, (3, 2)))
    heads = random_heads(tokens_of(trees), keys=1, group=1, size=size, dtype=dtype)
    assert varlen_attention(heads.plain, varlen_of(trees, CPU), scale=0.2) is None
    expected = attended(heads, trees, scale=size**-0.5)
    torch.testing.assert_close(plans_output(heads, trees).double(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(
    ("rules", "expected_calls"),
    [({}, 1), ({"sliding_window": 6}, 1), ({"sliding_window": 5}, 1), ({"softcap": 2.0}, 0)],
    ids=["nothing", "a window that does not bind", "a window that binds", "a cap"],
)
def test_a_kernel_is_asked_only_for_what_it_knows(
    rules: dict[str, float], expected_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(heads: varlen.Heads, call: Call, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        calls.append(window)
        return kernel(heads, call, scale, window)

    monkeypatch.setattr(varlen, "_kernel", lambda: counted)
    trees = trees_of((3, (3, 2)))
    heads = random_heads(tokens_of(trees), keys=1, group=2, size=16, dtype=torch.float16)
    window, cap = rules.get("sliding_window"), rules.get("softcap")
    expected = attended(heads, trees, scale=0.25, window=None if window is None else int(window), cap=cap)
    torch.testing.assert_close(plans_output(heads, trees, **rules).double(), expected, atol=5e-3, rtol=0)
    assert calls == [window] * expected_calls


def test_without_a_kernel_the_row_is_computed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: None)
    trees = trees_of((4, (3, 2)))
    heads = random_heads(tokens_of(trees), keys=1, group=1, size=8, dtype=torch.float16)
    expected = attended(heads, trees, scale=8**-0.5)
    torch.testing.assert_close(plans_output(heads, trees).double(), expected, atol=5e-3, rtol=0)


def test_the_kernel_of_torch_gets_what_it_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own operator, with the reference kernel in place of the one that needs a GPU."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]

    def flash(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
        (queries, keys, longest_queries, longest_keys, *_) = lengths
        call = Call(slice(0), varlen.Ends(queries, longest_queries), varlen.Ends(keys, longest_keys), None)
        left = options["window_size_left"]
        out, lse_HQ = kernel((q, k, v), call, options["scale"], None if left < 0 else left + 1)
        return out, lse_HQ, torch.empty(0), torch.empty(0), torch.empty(0)

    library.impl("_flash_attention_forward", flash, "CPU")  # type: ignore[no-untyped-call]
    monkeypatch.setattr(varlen, "_kernel", lambda: varlen._torch_kernel)
    trees = trees_of(*ROWS["trees with branches and without"])
    heads = random_heads(tokens_of(trees), keys=2, group=2, size=16, dtype=torch.bfloat16)
    for window in (None, 6):
        found = varlen_attention(heads.plain, varlen_of(trees, CPU), scale=0.2, window=window)
        assert found is not None
        expected = attended(heads, trees, scale=0.2, window=window)
        torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[torch.bfloat16], rtol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("looked_up_again")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group", "size"), [(1, 64), (2, 128), (7, 64), (4, 256)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ROWS)
def test_the_kernels_of_a_gpu_give_what_is_written_down(
    name: str, rule: str, group: int, size: int, dtype: torch.dtype
) -> None:
    trees, cuda = trees_of(*ROWS[name]), torch.device("cuda")
    heads = random_heads(tokens_of(trees), keys=2, group=group, size=size, dtype=dtype)
    q, k, v = (x.to(cuda) for x in heads.plain)
    rules = RULES[rule] | ({"sinks_H": torch.linspace(-2, 3, len(q))} if "sinks_H" in RULES[rule] else {})
    on_gpu: dict[str, Any] = {name: rule.to(cuda) if isinstance(rule, Tensor) else rule for name, rule in rules.items()}
    found = varlen_attention((q, k, v), varlen_of(trees, cuda), scale=size**-0.5, **on_gpu)
    assert found is not None, "neither flash-attn nor torch has a kernel here"
    expected = attended(heads, trees, scale=size**-0.5, **rules)
    torch.testing.assert_close(found.cpu().double(), expected, atol=2 * TOLERANCE[dtype], rtol=0)
