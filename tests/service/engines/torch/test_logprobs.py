"""The token log-prob function against brute force over the whole vocabulary, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from random import Random

import numpy as np
import pytest
import torch
from dense_reward.engines.kernels.fused_sums import FusedSums
from dense_reward.engines.torch import logprobs
from dense_reward.engines.torch.logprobs import ModelRows, ScoredRows, Tiling, WantedIds, score_rows
from dense_reward.records import Wants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.slow

ALL = Wants(kl=True, entropy=True, varentropy=True, top_k=3)
WHOLE = Tiling(1 << 20, 1 << 20)
tilings = st.builds(Tiling, st.integers(1, 50), st.integers(1, 20))
seeds = st.integers(0, 2**32)


@dataclass(slots=True)
class Given:
    """A head whose rows are its logits; it records the shape of every tile that it computes."""

    vocab_size: int
    tiled: bool = True
    shapes: list[tuple[int, int]] = field(default_factory=list)

    def logits(self, rows_CV: Tensor, tile: slice) -> Tensor:
        found = rows_CV[:, tile].clone()
        self.shapes.append((found.shape[0], found.shape[1]))
        return found

    def exact_logits(self, _: Tensor, __: Tensor) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Case:
    """Logits of both models for R states over V token ids, and J wanted ids with their rows."""

    sft_RV: Tensor
    reference_RV: Tensor
    wanted: WantedIds

    def scored(self, wants: Wants = ALL, tiling: Tiling | None = WHOLE, *, tiled: bool = True) -> ScoredRows:
        head = Given(self.sft_RV.shape[1], tiled)
        return score_rows(
            ModelRows(self.sft_RV, head), ModelRows(self.reference_RV, head), self.wanted, wants, tiling=tiling
        )


def wanted_ids(rows: list[int], ids: list[int]) -> WantedIds:
    return WantedIds(np.array(rows, dtype=np.int64), np.array(ids, dtype=np.int32))


def case(seed: int, r: int, v: int, j: int, dtype: torch.dtype = torch.float64) -> Case:
    """The wanted ids are anywhere, many of one row and none of another."""
    random = torch.Generator().manual_seed(seed)

    def logits() -> Tensor:
        return (torch.randn(r, v, generator=random, dtype=torch.float64) * 4).to(dtype)

    def some(limit: int) -> list[int]:
        found: list[int] = torch.randint(0, limit, (j,), generator=random).tolist()
        return found

    return Case(logits(), logits(), wanted_ids(some(r) if r else [], some(v) if r else []))


def pair_of_rows(sft: list[float], reference: list[float]) -> Case:
    return Case(torch.tensor([sft]), torch.tensor([reference]), wanted_ids([0], [0]))


def probabilities(logits_V: Tensor) -> list[float]:
    """Softmax, one token id at a time, in Python's own arithmetic."""
    largest = float(logits_V.max())
    weights = [torch.exp(torch.tensor(float(x) - largest, dtype=torch.float64)).item() for x in logits_V]
    return [weight / sum(weights) for weight in weights]


def log(x: float) -> float:
    return float(torch.log(torch.tensor(x, dtype=torch.float64)))


def given_tensor(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def assert_close(found: Tensor | None, expected: list[float]) -> None:
    torch.testing.assert_close(given_tensor(found), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@settings(deadline=None)
@given(seeds, st.integers(1, 7), st.integers(3, 20), st.integers(0, 12), tilings)
def test_every_quantity_is_its_definition_summed_over_the_whole_vocabulary(
    seed: int, r: int, v: int, j: int, tiling: Tiling
) -> None:
    made = case(seed, r, v, j)
    found = made.scored(tiling=tiling)
    p, q = ([probabilities(row) for row in logits] for logits in (made.sft_RV, made.reference_RV))
    wanted = list(zip(made.wanted.row_J.tolist(), made.wanted.id_J.tolist(), strict=True))
    assert_close(found.sft_logprob_J, [log(p[row][token]) for row, token in wanted])
    assert_close(found.reference_logprob_J, [log(q[row][token]) for row, token in wanted])
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(p, q, strict=True)]
    assert_close(found.kl_R, [sum(a * (log(a) - log(b)) for a, b in row) for row in pairs])
    entropies = [-sum(a * log(a) for a in row) for row in p]
    assert_close(found.entropy_R, entropies)
    spreads = [sum(a * (log(a) + h) ** 2 for a in row) for row, h in zip(p, entropies, strict=True)]
    assert_close(found.varentropy_R, spreads)
    for i, top in enumerate(given_tensor(found.top_ids_RK).tolist()):
        assert_close(given_tensor(found.top_sft_logprob_RK)[i], sorted(map(log, p[i]), reverse=True)[:3])
        assert_close(given_tensor(found.top_sft_logprob_RK)[i], [log(p[i][token]) for token in top])
        assert_close(given_tensor(found.top_reference_logprob_RK)[i], [log(q[i][token]) for token in top])


@settings(deadline=None)
@given(seeds, st.integers(1, 40), st.integers(0, 60), tilings)
def test_the_size_of_chunks_and_tiles_changes_nothing(seed: int, r: int, j: int, tiling: Tiling) -> None:
    made = case(seed, r, 17, j)
    whole, tiled = made.scored(), made.scored(tiling=tiling)
    for column in fields(ScoredRows):
        found, expected = getattr(tiled, column.name), getattr(whole, column.name)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12, msg=column.name)


@settings(deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 60), st.integers(1, 50), st.integers(1, 20))
def test_the_size_of_a_chunk_changes_no_bit(seed: int, r: int, j: int, rows: int, vocab: int) -> None:
    made = case(seed, r, 17, j)
    one, other = made.scored(tiling=Tiling(1000, vocab)), made.scored(tiling=Tiling(rows, vocab))
    for column in fields(ScoredRows):
        assert torch.equal(getattr(one, column.name), getattr(other, column.name)), column.name


@settings(deadline=None)
@given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=20), tilings, st.randoms(use_true_random=False))
def test_every_id_gets_its_own_row_in_whatever_order_and_number_they_are_named(
    seed: int, counts: list[int], tiling: Tiling, random: Random
) -> None:
    """Many for one row and none for another, the same id twice, shuffled."""
    made = case(seed, len(counts), 13, 0)
    rows = [row for row, count in enumerate(counts) for _ in range(count)] * 2
    random.shuffle(rows)
    wanted = wanted_ids(rows, [(7 * i) % 13 for i in range(len(rows))])
    found = replace(made, wanted=wanted).scored(Wants(), tiling)
    for logits_RV, logprob_J in ((made.sft_RV, found.sft_logprob_J), (made.reference_RV, found.reference_logprob_J)):
        expected_J = torch.log_softmax(logits_RV, 1)[wanted.row_J, wanted.id_J]
        torch.testing.assert_close(logprob_J, expected_J, atol=1e-12, rtol=0)


@pytest.mark.parametrize("wants", [Wants(), ALL], ids=["log-probs", "everything"])
def test_the_heads_are_never_asked_for_more_than_a_tile_and_once_for_each(wants: Wants) -> None:
    """The logits of all rows over the whole vocabulary are never computed, however many ids are wanted."""
    made, heads = case(0, 10, 50, 300), (Given(50), Given(50))
    score_rows(
        ModelRows(made.sft_RV, heads[0]),
        ModelRows(made.reference_RV, heads[1]),
        made.wanted,
        wants,
        tiling=Tiling(4, 20),
    )
    for head in heads:
        assert head.shapes == [(rows, vocab) for rows in (4, 4, 2) for vocab in (20, 20, 10)]


def test_a_head_that_cannot_be_tiled_is_asked_for_whole_rows_and_as_many_logits_at_once() -> None:
    made = case(0, 10, 50, 30)
    for tiled in ((True, False), (False, True), (False, False)):
        heads = [Given(50, each) for each in tiled]
        models = ModelRows(made.sft_RV, heads[0]), ModelRows(made.reference_RV, heads[1])
        found = score_rows(*models, made.wanted, ALL, tiling=Tiling(8, 20))
        assert [head.shapes for head in heads] == [[(3, 50), (3, 50), (3, 50), (1, 50)]] * 2
        for column in fields(ScoredRows):
            torch.testing.assert_close(getattr(found, column.name), getattr(made.scored(), column.name))


def test_a_head_that_cannot_be_tiled_is_asked_for_at_least_a_row() -> None:
    made, head = case(0, 3, 50, 3), Given(50, tiled=False)
    score_rows(ModelRows(made.sft_RV, head), ModelRows(made.reference_RV, head), made.wanted, tiling=Tiling(2, 4))
    assert head.shapes == [(1, 50)] * 6


@pytest.mark.parametrize("tiling", [WHOLE, Tiling(7, 90), None], ids=["whole", "tiled", "the device's own"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_identical_models_give_a_reward_and_a_kl_of_exactly_0(dtype: torch.dtype, tiling: Tiling | None) -> None:
    made = case(3, 50, 400, 150, dtype)
    rows = replace(made, reference_RV=made.sft_RV.clone()).scored(tiling=tiling)
    assert torch.equal(rows.sft_logprob_J, rows.reference_logprob_J)
    assert torch.equal(given_tensor(rows.top_sft_logprob_RK), given_tensor(rows.top_reference_logprob_RK))
    assert not given_tensor(rows.kl_R).any()


@pytest.mark.parametrize("tiling", [WHOLE, Tiling(700, 9)], ids=["whole", "tiled"])
def test_kl_is_never_negative_where_two_models_differ_by_rounding_alone(tiling: Tiling) -> None:
    logits_RV = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0)) * 6
    noise_RV = 1e-7 * torch.randn(2000, 50, generator=torch.Generator().manual_seed(1))
    kl_R = given_tensor(Case(logits_RV, logits_RV + noise_RV, wanted_ids([], [])).scored(tiling=tiling).kl_R)
    assert kl_R.min() >= 0
    assert kl_R.max() < 1e-6


@settings(deadline=None)
@given(seeds, tilings)
def test_the_reward_that_the_sft_model_itself_expects_is_kl(seed: int, tiling: Tiling) -> None:
    made = case(seed, 6, 11, 0)
    every_id = wanted_ids([row for row in range(6) for _ in range(11)], list(range(11)) * 6)
    rows = replace(made, wanted=every_id).scored(tiling=tiling)
    reward_RV = (rows.sft_logprob_J - rows.reference_logprob_J).reshape(6, 11)
    expected_R = (torch.softmax(made.sft_RV, dim=1) * reward_RV).sum(1)
    torch.testing.assert_close(given_tensor(rows.kl_R), expected_R, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("tiling", [WHOLE, Tiling(7, 500)], ids=["whole", "tiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_dtypes_are_reduced_in_float32(dtype: torch.dtype, tiling: Tiling) -> None:
    made = case(5, 20, 3000, 60, dtype)
    rows = made.scored(tiling=tiling)
    exact = Case(made.sft_RV.double(), made.reference_RV.double(), made.wanted).scored()
    for column in fields(ScoredRows):
        if column.name not in {"top_ids_RK", "top_reference_logprob_RK"}:  # equal logits may be listed in any order
            found, expected = given_tensor(getattr(rows, column.name)), given_tensor(getattr(exact, column.name))
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


ONE_BY_ONE = Tiling(1, 1)
at_any_tiling = pytest.mark.parametrize("tiling", [WHOLE, ONE_BY_ONE, Tiling(1, 2)], ids=["whole", "singly", "in twos"])


@at_any_tiling
def test_a_word_that_the_sft_model_rules_out_adds_nothing_to_kl_and_entropy(tiling: Tiling) -> None:
    never = -torch.inf
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        sft, both = ([[0.0, 0.0, never, never][i] for i in order], [[0.0, 0.0, 0.0, never][i] for i in order])
        rows = pair_of_rows(sft, both).scored(tiling=tiling)
        torch.testing.assert_close(given_tensor(rows.entropy_R), torch.tensor([2.0]).log())
        torch.testing.assert_close(given_tensor(rows.kl_R), torch.tensor([1.5]).log())
        assert rows.sft_logprob_J.item() == pytest.approx(-np.log(2) if sft[0] == 0.0 else -np.inf)


@at_any_tiling
def test_a_word_that_only_the_reference_rules_out_makes_kl_infinite_and_not_a_made_up_number(tiling: Tiling) -> None:
    rows = pair_of_rows([0.0, 0.0], [0.0, -torch.inf]).scored(Wants(kl=True), tiling)
    assert given_tensor(rows.kl_R).item() == torch.inf


@at_any_tiling
@pytest.mark.parametrize("sft", [[0.0, torch.nan, 1.0], [torch.nan, 0.0, 1.0]])
def test_a_nan_is_passed_on_and_never_hidden(sft: list[float], tiling: Tiling) -> None:
    rows = pair_of_rows(sft, [0.0, 1.0, 2.0]).scored(tiling=tiling)
    assert rows.sft_logprob_J.isnan().all()
    assert rows.reference_logprob_J.isfinite().all()
    assert not given_tensor(rows.kl_R).isfinite().any()
    assert not given_tensor(rows.entropy_R).isfinite().any()


@at_any_tiling
def test_large_logits_do_not_round_the_small_difference_that_a_log_prob_is(tiling: Tiling) -> None:
    rows = pair_of_rows([30_000.0, 30_000.0, -30_000.0], [-30_000.0, -30_001.0, -90_000.0]).scored(tiling=tiling)
    torch.testing.assert_close(rows.sft_logprob_J, torch.tensor([0.5]).log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        rows.reference_logprob_J, -torch.tensor([1 + np.exp(-1)]).log().float(), atol=1e-6, rtol=0
    )


@settings(deadline=None)
@given(seeds, st.booleans(), st.booleans(), st.integers(0, 20), tilings)
def test_what_is_asked_beside_them_changes_no_bit_of_the_log_probs(
    seed: int, kl: bool, entropy: bool, top_k: int, tiling: Tiling
) -> None:
    made = case(seed, 9, 13, 40, torch.float32)
    bare, full = made.scored(Wants(), tiling), made.scored(Wants(kl, entropy, top_k), tiling)
    assert torch.equal(bare.sft_logprob_J, full.sft_logprob_J)
    assert torch.equal(bare.reference_logprob_J, full.reference_logprob_J)


def test_what_nobody_asked_for_is_not_computed() -> None:
    rows = case(1, 4, 6, 4).scored(Wants())
    assert [f.name for f in fields(ScoredRows) if getattr(rows, f.name) is not None] == [
        "sft_logprob_J",
        "reference_logprob_J",
    ]


def test_more_alternatives_than_words_are_all_words() -> None:
    rows = case(1, 4, 6, 4).scored(Wants(top_k=9), Tiling(3, 2))
    assert given_tensor(rows.top_ids_RK).sort(dim=1).values.tolist() == [list(range(6))] * 4


def test_no_rows_give_empty_columns_of_the_right_shape() -> None:
    rows = case(1, 0, 6, 0).scored()
    shapes = {column.name: tuple(getattr(rows, column.name).shape) for column in fields(ScoredRows)}
    assert {shape for name, shape in shapes.items() if name.endswith(("_R", "_J"))} == {(0,)}
    assert shapes["top_ids_RK"] == (0, 3)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, False)], ids=str)
def test_the_fused_sums_are_for_float32_only(dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's interpreter: as if this device were a GPU."""
    pytest.importorskip("triton")
    made: list[FusedSums] = []

    class Recorded(FusedSums):
        def __init__(self, models: int, pairs: Sequence[tuple[int, int]], wants: Wants) -> None:
            super().__init__(models, pairs, wants)
            made.append(self)

    monkeypatch.setattr(logprobs, "cannot_fuse", lambda *_: None)
    monkeypatch.setattr(logprobs, "FusedSums", Recorded)
    of_gpu, plain = case(3, 5, 30, 9, dtype), case(3, 5, 30, 9, torch.float64)
    found = of_gpu.scored(tiling=Tiling(2, 11))
    assert bool(made) is fused
    for column in ("sft_logprob_J", "reference_logprob_J", "kl_R", "entropy_R", "varentropy_R"):
        exact = getattr(plain.scored(), column)
        torch.testing.assert_close(getattr(found, column).double(), exact, atol=1e-5 if fused else 1e-12, rtol=0)
