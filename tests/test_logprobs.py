"""The token log-prob function against brute force over the whole vocabulary, in float64."""

from dataclasses import dataclass, fields

import pytest
import torch
from dense_reward.engine.base import Wants
from dense_reward.engine.logprobs import Candidates, ScoredRows, Side, score_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

ALL = Wants(kl=True, entropy=True, top_k=3)


@dataclass(frozen=True, slots=True)
class Case:
    """Logits of both models for N states over V words, what came next, and K candidates."""

    sft_NV: Tensor
    reference_NV: Tensor
    targets_N: Tensor
    candidates_NK: Tensor

    def scored(self, wants: Wants = ALL, *, chunk_rows: int = 256) -> ScoredRows:
        sft, reference = Side(self.sft_NV, _itself), Side(self.reference_NV, _itself)
        counts_N = torch.full((len(self.targets_N),), self.candidates_NK.shape[1])
        named = Candidates(self.candidates_NK.flatten(), counts_N)
        return score_rows(sft, reference, self.targets_N, wants, named, chunk_rows=chunk_rows)


def _itself(rows: Tensor) -> Tensor:
    return rows


def case(seed: int, n: int, v: int, k: int, dtype: torch.dtype = torch.float64) -> Case:
    random = torch.Generator().manual_seed(seed)

    def logits() -> Tensor:
        return (torch.randn(n, v, generator=random, dtype=torch.float64) * 4).to(dtype)

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, v, shape, generator=random)

    return Case(logits(), logits(), ids(n), ids(n, k))


def probabilities(logits_V: Tensor) -> list[float]:
    """Softmax, one word at a time, in Python's own arithmetic."""
    largest = float(logits_V.max())
    weights = [torch.exp(torch.tensor(float(x) - largest, dtype=torch.float64)).item() for x in logits_V]
    return [weight / sum(weights) for weight in weights]


def log(x: float) -> float:
    return float(torch.log(torch.tensor(x, dtype=torch.float64)))


def given_tensor(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 7), st.integers(3, 20), st.integers(1, 4), st.integers(1, 9))
def test_every_quantity_is_its_definition_summed_over_the_whole_vocabulary(
    seed: int, n: int, v: int, k: int, chunk_rows: int
) -> None:
    made = case(seed, n, v, k)
    rows = made.scored(chunk_rows=chunk_rows)
    assert len(rows.sft_logprob_N) == n
    rewards_NK = given_tensor(rows.candidate_reward_M).reshape(n, k)
    for i in range(n):
        p, q = probabilities(made.sft_NV[i]), probabilities(made.reference_NV[i])
        ratio = [log(a) - log(b) for a, b in zip(p, q, strict=True)]
        target = int(made.targets_N[i])
        expected = {
            "sft_logprob_N": log(p[target]),
            "reference_logprob_N": log(q[target]),
            "kl_N": sum(a * r for a, r in zip(p, ratio, strict=True)),
            "entropy_N": -sum(a * log(a) for a in p),
            "top_sft_logprob_NK": sorted((log(a) for a in p), reverse=True)[:3],
        }
        for name, value in expected.items():
            found = given_tensor(getattr(rows, name))[i]
            torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float64), atol=1e-9, rtol=0)
        named = torch.tensor([ratio[int(c)] for c in made.candidates_NK[i]], dtype=torch.float64)
        torch.testing.assert_close(rewards_NK[i], named, atol=1e-9, rtol=0)
        top = given_tensor(rows.top_ids_NK)[i].tolist()
        reference_of_top = torch.tensor([log(q[word]) for word in top], dtype=torch.float64)
        torch.testing.assert_close(given_tensor(rows.top_reference_logprob_NK)[i], reference_of_top, atol=1e-9, rtol=0)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 50))
def test_the_size_of_a_chunk_changes_nothing(seed: int, n: int, chunk_rows: int) -> None:
    made = case(seed, n, 17, 2)
    whole, chunked = made.scored(chunk_rows=1000), made.scored(chunk_rows=chunk_rows)
    for field in fields(ScoredRows):
        assert torch.equal(getattr(whole, field.name), getattr(chunked, field.name)), field.name


@settings(deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 9))
def test_every_position_gets_the_candidates_that_it_named_however_many_others_name(
    seed: int, counts: list[int], chunk_rows: int
) -> None:
    made = case(seed, len(counts), 13, 5)
    ids = [made.candidates_NK[i, :count] for i, count in enumerate(counts)]
    rows = score_rows(
        Side(made.sft_NV, _itself),
        Side(made.reference_NV, _itself),
        made.targets_N,
        Wants(),
        Candidates(torch.cat(ids).int(), torch.tensor(counts)),
        chunk_rows=chunk_rows,
    )
    reward_NV = torch.log_softmax(made.sft_NV, 1) - torch.log_softmax(made.reference_NV, 1)
    expected_M = torch.cat([reward_NV[i, of_row] for i, of_row in enumerate(ids)])
    torch.testing.assert_close(given_tensor(rows.candidate_reward_M), expected_M, atol=1e-12, rtol=0)


def test_the_head_sees_no_more_rows_at_once_than_a_chunk_has() -> None:
    seen: list[int] = []

    def head(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return rows

    made = case(0, 10, 5, 1)
    score_rows(Side(made.sft_NV, head), Side(made.reference_NV, head), made.targets_N, ALL, chunk_rows=4)
    assert seen == [4, 4, 4, 4, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_identical_models_give_a_reward_and_a_kl_of_exactly_0(dtype: torch.dtype) -> None:
    made = case(3, 50, 400, 2, dtype)
    rows = Case(made.sft_NV, made.sft_NV.clone(), made.targets_N, made.candidates_NK).scored()
    assert torch.equal(rows.sft_logprob_N, rows.reference_logprob_N)
    assert not given_tensor(rows.kl_N).any()
    assert not given_tensor(rows.candidate_reward_M).any()


def test_kl_is_never_negative_where_two_models_differ_by_rounding_alone() -> None:
    logits_NV = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0)) * 6
    noise_NV = 1e-7 * torch.randn(2000, 50, generator=torch.Generator().manual_seed(1))
    rows = Case(logits_NV, logits_NV + noise_NV, torch.zeros(2000, dtype=torch.long), torch.zeros(2000, 1).long())
    kl_N = given_tensor(rows.scored().kl_N)
    assert kl_N.min() >= 0
    assert kl_N.max() < 1e-6


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_the_reward_that_the_sft_model_itself_expects_is_kl(seed: int) -> None:
    made = case(seed, 6, 11, 1)
    every_word = torch.arange(11).repeat(6, 1)
    rows = Case(made.sft_NV, made.reference_NV, made.targets_N, every_word).scored()
    expected_N = (torch.softmax(made.sft_NV, dim=1) * given_tensor(rows.candidate_reward_M).reshape(6, 11)).sum(1)
    torch.testing.assert_close(given_tensor(rows.kl_N), expected_N, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_reduced_in_float32(dtype: torch.dtype) -> None:
    made = case(5, 20, 3000, 1, dtype)
    rows = made.scored()
    exact = Case(made.sft_NV.double(), made.reference_NV.double(), made.targets_N, made.candidates_NK).scored()
    for field in fields(ScoredRows):
        if field.name not in {"top_ids_NK", "top_reference_logprob_NK"}:  # equal logits may be listed in any order
            found, expected = given_tensor(getattr(rows, field.name)), given_tensor(getattr(exact, field.name))
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


def test_a_word_that_the_sft_model_rules_out_adds_nothing_to_kl_and_entropy() -> None:
    never = -torch.inf
    sft, both = torch.tensor([[0.0, 0.0, never, never]]), torch.tensor([[0.0, 0.0, 0.0, never]])
    rows = Case(sft, both, torch.tensor([0]), torch.tensor([[1]])).scored()
    torch.testing.assert_close(given_tensor(rows.entropy_N), torch.tensor([2.0]).log())
    torch.testing.assert_close(given_tensor(rows.kl_N), torch.tensor([1.5]).log())


def test_a_word_that_only_the_reference_rules_out_makes_kl_infinite_and_not_a_made_up_number() -> None:
    sft, reference = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])
    rows = Case(sft, reference, torch.tensor([0]), torch.tensor([[1]])).scored(Wants(kl=True))
    assert given_tensor(rows.kl_N).item() == torch.inf


def test_a_nan_is_passed_on_and_never_hidden() -> None:
    sft, reference = torch.tensor([[0.0, torch.nan]]), torch.tensor([[0.0, 1.0]])
    rows = Case(sft, reference, torch.tensor([0]), torch.tensor([[1]])).scored(Wants(kl=True, entropy=True))
    assert rows.sft_logprob_N.isnan().all()
    assert not given_tensor(rows.kl_N).isfinite().any()
    assert not given_tensor(rows.entropy_N).isfinite().any()


def test_what_nobody_asked_for_is_not_computed() -> None:
    made = case(1, 4, 6, 1)
    rows = score_rows(Side(made.sft_NV, _itself), Side(made.reference_NV, _itself), made.targets_N, Wants())
    assert [f.name for f in fields(ScoredRows) if getattr(rows, f.name) is not None] == [
        "sft_logprob_N",
        "reference_logprob_N",
    ]


def test_no_rows_give_empty_columns_of_the_right_shape() -> None:
    rows = case(1, 0, 6, 2).scored()
    shapes = {field.name: tuple(getattr(rows, field.name).shape) for field in fields(ScoredRows)}
    assert {shape for name, shape in shapes.items() if name.endswith(("_N", "_M"))} == {(0,)}
    assert shapes["top_ids_NK"] == (0, 3)
