"""Kernels for sequences of variable length: their arguments, and how their two results are merged."""

from collections.abc import Iterator

import pytest
import torch
from dense_reward.batching.packing import Tree
from dense_reward.engines.torch import varlen
from dense_reward.engines.torch.attention import RowPlan, packed_attention
from dense_reward.engines.torch.varlen import Ends, varlen_attention, varlen_of
from reference_attention import TOLERANCE, Heads, Shape, attended, random_heads, tokens_of, trees_of
from torch import Tensor, nn

CPU = torch.device("cpu")
ROWS: dict[str, tuple[Shape, ...]] = {
    "one sequence": ((7, ()),),
    "one branch": ((7, (3,)),),
    "prompts alone": ((7, ()), (1, ()), (4, (2,))),
    "branches of one tree": ((5, (3, 3, 1)),),
    "trees with branches and without": ((9, ()), (23, (5, 19, 1, 19, 40)), (3, (1,)), (1, (1, 1)), (4, (2,) * 30)),
}


def kernel(heads: varlen.Heads, ends: tuple[Ends, Ends], scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """flash-attn's and torch's kernel in plain torch: sequences by their ends, log-sum-exp by token."""
    q, k, v = heads
    queries, keys = (end.ends.tolist() for end in ends)
    for end in ends:
        assert end.ends.dtype == torch.int32
        assert end.longest == int(end.ends.diff().max())
    assert (queries[-1], keys[-1]) == (len(q), len(k))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    for i in range(len(queries) - 1):
        at, of = slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])
        key, value = (x[of].float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores_HTS = torch.einsum("thd,shd->hts", q[at].float(), key) * scale
        if causal:
            scores_HTS = scores_HTS.masked_fill(~torch.ones(scores_HTS.shape[1:]).tril().bool(), -torch.inf)
        out[at] = torch.einsum("hts,shd->thd", scores_HTS.softmax(2), value).to(q.dtype)
        lse[at] = scores_HTS.logsumexp(2).T
    return out, lse


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("name", ROWS)
def test_two_calls_for_a_row_are_attention_over_trunk_and_branch(name: str, group: int, dtype: torch.dtype) -> None:
    trees = trees_of(*ROWS[name])
    heads = random_heads(tokens_of(trees), keys=2, group=group, size=16, dtype=dtype)
    found = varlen_attention(heads.plain, varlen_of(trees, CPU), scale=0.2)
    assert found is not None
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), attended(heads, trees, scale=0.2), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.usefixtures("reference_kernel")
@pytest.mark.parametrize("name", ROWS)
def test_the_kernels_of_a_device_give_what_those_of_the_cpu_give(name: str) -> None:
    trees = trees_of(*ROWS[name])
    heads = random_heads(tokens_of(trees), keys=2, group=2, size=16, dtype=torch.float16)
    theirs = plans_output(heads, trees)
    ours = packed_attention(nn.Identity(), heads.q, heads.k, heads.v, None, plan=RowPlan(trees))[0][0]
    torch.testing.assert_close(theirs, ours, atol=TOLERANCE[torch.float16], rtol=0)


def test_a_row_is_described_by_the_ends_of_its_sequences_and_by_the_trunk_of_each_branch() -> None:
    row = varlen_of(trees_of((2, ()), (3, (2, 1, 2)), (1, (1, 4))), CPU)
    assert row.segments.ends.tolist() == [0, 2, 5, 6, 8, 10, 11, 12, 16]
    assert row.segments.longest == 4
    assert row.branch_rows_M is not None
    assert row.branch_rows_M.tolist() == [5, 6, 7, 8, 9, 11, 12, 13, 14, 15]
    assert row.branches is not None
    assert (row.branches.ends.tolist(), row.branches.longest) == ([0, 5, 10], 5)
    assert row.trunk_rows_L is not None
    assert row.trunk_rows_L.tolist() == [2, 3, 4, 10]
    assert row.trunks is not None
    assert (row.trunks.ends.tolist(), row.trunks.longest) == ([0, 3, 4], 3)


@pytest.mark.usefixtures("reference_kernel")
@pytest.mark.parametrize(("size", "dtype"), [(8, torch.float32), (8, torch.float64), (264, torch.float16)], ids=str)
def test_what_no_kernel_computes_is_left_to_others(size: int, dtype: torch.dtype) -> None:
    trees = trees_of((4, (3, 2)))
    heads = random_heads(tokens_of(trees), keys=1, group=1, size=size, dtype=dtype)
    assert varlen_attention(heads.plain, varlen_of(trees, CPU), scale=0.2) is None
    expected = attended(heads, trees, scale=size**-0.5)
    torch.testing.assert_close(plans_output(heads, trees).double(), expected, atol=TOLERANCE[dtype], rtol=0)


RULES: dict[str, tuple[dict[str, float], int]] = {
    "nothing": ({}, 2),
    "a window that does not bind": ({"sliding_window": 6}, 2),
    "a window that binds": ({"sliding_window": 5}, 0),
    "a cap": ({"softcap": 2.0}, 0),
}


@pytest.mark.parametrize("name", RULES)
def test_a_kernel_is_asked_only_for_what_it_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules, expected_calls = RULES[name]
    calls = []

    def counted(heads: varlen.Heads, ends: tuple[Ends, Ends], scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        calls.append(causal)
        return kernel(heads, ends, scale, causal)

    monkeypatch.setattr(varlen, "_kernel", lambda: counted)
    trees = trees_of((3, (3, 2)))
    heads = random_heads(tokens_of(trees), keys=1, group=2, size=16, dtype=torch.float16)
    window, cap = rules.get("sliding_window"), rules.get("softcap")
    expected = attended(heads, trees, scale=0.25, window=None if window is None else int(window), cap=cap)
    torch.testing.assert_close(plans_output(heads, trees, **rules).double(), expected, atol=5e-3, rtol=0)
    assert calls == [True, False][:expected_calls]


def test_without_a_kernel_the_row_is_computed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: None)
    trees = trees_of((4, (3, 2)))
    heads = random_heads(tokens_of(trees), keys=1, group=1, size=8, dtype=torch.float16)
    expected = attended(heads, trees, scale=8**-0.5)
    torch.testing.assert_close(plans_output(heads, trees).double(), expected, atol=5e-3, rtol=0)


@pytest.mark.usefixtures("looked_up_again")
def test_a_log_sum_exp_given_by_head_is_turned_to_tokens_also_where_there_are_as_many_of_both() -> None:
    for tokens in (3, 4):
        lse_HN, out = torch.arange(4.0 * tokens).reshape(4, tokens), torch.empty(tokens, 4, 8)
        assert torch.equal(varlen._by_token(lse_HN, out), lse_HN.T)


@pytest.mark.gpu
@pytest.mark.usefixtures("looked_up_again")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group", "size"), [(1, 64), (2, 128), (7, 64), (4, 256)])
@pytest.mark.parametrize("name", ROWS)
def test_the_kernels_of_a_gpu_give_what_is_written_down(name: str, group: int, size: int, dtype: torch.dtype) -> None:
    trees, cuda = trees_of(*ROWS[name]), torch.device("cuda")
    heads = random_heads(tokens_of(trees), keys=2, group=group, size=size, dtype=dtype)
    q, k, v = (x.to(cuda) for x in heads.plain)
    found = varlen_attention((q, k, v), varlen_of(trees, cuda), scale=size**-0.5)
    assert found is not None, "neither flash-attn nor torch has a kernel here"
    expected = attended(heads, trees, scale=size**-0.5)
    torch.testing.assert_close(found.cpu().double(), expected, atol=2 * TOLERANCE[dtype], rtol=0)
