"""A torch pair as a teacher: log-probs, ranks and likeliest ids of one distribution, against plain forwards."""

from functools import cache

import numpy as np
import pytest
import torch
from dense_reward.engines.teacher.engine import TorchTeacher, teacher_rows
from dense_reward.engines.torch.logprobs import ModelRows, Tiling, WantedIds
from dense_reward.engines.torch.model import DeviceRow, TorchModel
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.records import Branch, IdArray, Teacher, TeacherScores, TokenScores, Trunk, Wants
from faulty_engines import INFO
from numpy.typing import NDArray
from shared_models import LAYERS, changed, counted, llama, upper
from tiny_configs import LONG_TOKENS, PADDED, VOCABULARY
from tiny_models import plain_logprobs, random_trunk, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

pytestmark = pytest.mark.slow

TOLERANCE_NATS = 1e-4
K = 5
TILTS = [0.0, -1.0, 1.0, -0.5, 2.5]


@cache
def models(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model(name, seed=1), tiny_model(name, seed=2)


@cache
def engine(name: str = "llama", max_batch_tokens: int = 1000) -> PairEngine:
    sft, reference = (TorchModel(tiny_model(name, seed=seed)) for seed in (1, 2))
    return PairEngine(sft, reference, INFO, ComputeOptions(max_batch_tokens, packed=name not in PADDED))


def expected(name: str, prompt: IdArray, ids: IdArray, teacher: Teacher) -> NDArray[np.float64]:
    """Log-probs before each token and after the last one, [T + 1, V], by transformers."""
    extended = np.append(ids, np.int32(0))
    sft_TV, reference_TV = (plain_logprobs(model, prompt, extended) for model in models(name))
    both_TV = (1 + teacher.tilt) * sft_TV - teacher.tilt * reference_TV
    return torch.log_softmax(both_TV / teacher.temperature, dim=-1).numpy()


def answered(found: TokenScores) -> TeacherScores:
    assert found.teacher is not None
    return found.teacher


def assert_taught(name: str, trunk: Trunk, g: int, teacher: Teacher, found: TeacherScores) -> None:
    branch = trunk.branches[g]
    logprob_TV = expected(name, trunk.prompt_P, branch.ids_T, teacher)
    scored = np.flatnonzero(branch.scored_T)
    own_S = logprob_TV[scored, branch.ids_T[scored]]
    np.testing.assert_allclose(found.logprob_S, own_S, atol=TOLERANCE_NATS)
    assert found.rank_S.tolist() == [1 + int((logprob_TV[t] > own).sum()) for t, own in zip(scored, own_S, strict=True)]
    top_SK = np.argsort(-logprob_TV[scored], axis=1)[:, : teacher.top_k]
    assert found.top_ids_SK.tolist() == top_SK.tolist()
    np.testing.assert_allclose(
        found.top_logprob_SK, np.take_along_axis(logprob_TV[scored], top_SK, 1), atol=TOLERANCE_NATS
    )
    if branch.candidates_SK is not None:
        assert found.candidate_logprob_SK is not None
        wanted_SK = np.take_along_axis(logprob_TV[scored], branch.candidates_SK, 1)
        np.testing.assert_allclose(found.candidate_logprob_SK, wanted_SK, atol=TOLERANCE_NATS)
    assert found.next_id == logprob_TV[-1].argmax()
    assert found.next_logprob == pytest.approx(logprob_TV[-1].max(), abs=TOLERANCE_NATS)


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_a_teacher_is_the_tilted_distribution_over_the_whole_vocabulary(name: str, tilt: float) -> None:
    trunks = [random_trunk(seed, 5, (6, 0, 9, 1), masked=seed > 0, k=2 * seed) for seed in range(3)]
    for teacher in (Teacher(tilt, 1.0, K), Teacher(tilt, 0.7, 0)):
        scores = TorchTeacher(engine(name), teacher).prepare(trunks, Wants())()
        for trunk, of_trunk in zip(trunks, scores, strict=True):
            for g, found in enumerate(of_trunk):
                assert_taught(name, trunk, g, teacher, answered(found))


def test_scores_are_the_same_in_many_small_forwards() -> None:
    trunks = [random_trunk(seed, 9, (6, 12, 30)) for seed in range(3)]
    teacher = Teacher(1.0, top_k=K)
    for trunk, of_trunk in zip(
        trunks, TorchTeacher(engine("llama", 20), teacher).prepare(trunks, Wants())(), strict=True
    ):
        for g, found in enumerate(of_trunk):
            assert_taught("llama", trunk, g, teacher, answered(found))


@pytest.mark.parametrize("tokens", [LONG_TOKENS - 1, LONG_TOKENS, LONG_TOKENS + 1])
def test_the_token_that_extends_a_sequence_does_not_make_it_longer_for_rope(tokens: int) -> None:
    ids = random_trunk(3, 1, (tokens - 1,))
    found = answered(TorchTeacher(engine("longrope"), Teacher(0.0)).prepare([ids], Wants())()[0][0])
    whole_T = np.concatenate([ids.prompt_P, ids.branches[0].ids_T])
    with torch.inference_mode():
        logits_LV: Tensor = models("longrope")[0](torch.from_numpy(whole_T).long()[None]).logits[0]
    logprob_LV = torch.log_softmax(logits_LV, dim=-1).numpy()
    np.testing.assert_allclose(found.logprob_S, logprob_LV[np.arange(tokens - 1), whole_T[1:]], atol=TOLERANCE_NATS)
    assert found.next_id == logprob_LV[-1].argmax()


def test_arrays_come_in_the_dtypes_of_the_contract() -> None:
    found = answered(TorchTeacher(engine(), Teacher(1.0, top_k=K)).prepare([random_trunk(0, k=2)], Wants())()[0][0])
    assert {found.rank_S.dtype, found.top_ids_SK.dtype} == {np.dtype(np.int32)}
    assert found.candidate_logprob_SK is not None
    floats = found.logprob_S, found.top_logprob_SK, found.candidate_logprob_SK
    assert {array.dtype for array in floats} == {np.dtype(np.float32)}


def test_equal_teachers_are_equal_engines_and_others_are_not() -> None:
    pair = engine()
    assert TorchTeacher(pair, Teacher(1.0)) == TorchTeacher(pair, Teacher(1.0))
    assert len({TorchTeacher(pair, Teacher(1.0, t, k)) for t in (1.0, 0.5) for k in (0, 3)}) == 4
    assert TorchTeacher(pair, Teacher(1.0)) != TorchTeacher(engine("gemma2"), Teacher(1.0))


def test_a_model_of_weight_0_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, trunk = engine(), random_trunk(0)
    run: list[TorchModel] = []
    packed = TorchModel.packed_rows

    def counted(model: TorchModel, row: DeviceRow) -> Tensor:
        run.append(model)
        return packed(model, row)

    monkeypatch.setattr(TorchModel, "packed_rows", counted)
    for tilt, expected_models in ((0.0, [pair.models[0]]), (-1.0, [pair.models[1]]), (0.5, list(pair.models))):
        run.clear()
        TorchTeacher(pair, Teacher(tilt)).prepare([trunk], Wants())()
        assert run == expected_models


def test_layers_that_both_models_share_are_computed_once() -> None:
    base = llama()
    sft, reference = TorchModel(base), TorchModel(changed(base, upper(2)))
    trunk, teacher = random_trunk(1), Teacher(1.0, top_k=K)
    alone, together = (
        TorchTeacher(PairEngine(sft, reference, INFO, ComputeOptions(1000), shared_layers=shared), teacher)
        for shared in (0, 2)
    )
    expected = alone.prepare([trunk], Wants())()[0]
    computed = counted([sft, reference])
    found = together.prepare([trunk], Wants())()[0]
    assert computed == {(0, layer): 1 for layer in range(LAYERS)} | {(1, layer): 1 for layer in range(2, LAYERS)}
    for a, b in zip(map(answered, found), map(answered, expected), strict=True):
        assert np.array_equal(a.logprob_S, b.logprob_S)
        assert np.array_equal(a.top_ids_SK, b.top_ids_SK)


def test_a_teacher_costs_one_token_more_than_scores() -> None:
    trunk = Trunk(np.array([1, 2], dtype=np.int32), (Branch(np.arange(5, dtype=np.int32), np.ones(5, dtype=bool)),))
    pair = engine()
    assert TorchTeacher(pair, Teacher(0.0)).cost(trunk).tokens == pair.cost(trunk).tokens + 1 == 7


class Given:
    """An output layer whose rows are the logits."""

    vocab_size = VOCABULARY
    tiled = True

    def logits(self, rows_CX: Tensor, tile: slice) -> Tensor:
        return rows_CX[:, tile].clone()

    def exact_logits(self, _: Tensor, __: Tensor) -> None:
        return None


def rows_of(sft: Tensor, reference: Tensor, tilt: float) -> NDArray[np.float32]:
    """Log-probs of all ids of one row."""
    everything = WantedIds(np.zeros(VOCABULARY, dtype=np.int64), np.arange(VOCABULARY, dtype=np.int32))
    rows = [ModelRows(logits[None], Given()) for logits in (sft, reference)]
    none = WantedIds(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32))
    return teacher_rows(rows, (1 + tilt, -tilt), everything, none, 1).target_logprob_S


@pytest.mark.parametrize("tilt", [-0.5, 1.0])
def test_an_id_that_sft_rules_out_is_ruled_out_whatever_the_reference_gives_it(tilt: float) -> None:
    torch.manual_seed(0)
    sft, reference = torch.randn(2, VOCABULARY, dtype=torch.float64)
    sft[[3, 7]] = reference[7] = -torch.inf
    found = rows_of(sft, reference, tilt)
    both = torch.where(sft == -torch.inf, -torch.inf, (1 + tilt) * sft - tilt * reference)
    np.testing.assert_allclose(found, torch.log_softmax(both, 0), atol=1e-6)
    assert np.isneginf(found[[3, 7]]).all()


def test_a_distribution_without_a_norm_is_not_a_number() -> None:
    sft, reference = torch.zeros(2, VOCABULARY)
    reference[3] = -torch.inf
    assert not np.isfinite(rows_of(sft, reference, 1.0)).any()


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    sft, reference = torch.randn(2, 9, VOCABULARY)
    random = np.random.default_rng(0)

    def wanted(count: int) -> WantedIds:
        return WantedIds(random.integers(0, 9, count), random.integers(0, VOCABULARY, count).astype(np.int32))

    targets, candidates = wanted(40), wanted(30)
    rows = [ModelRows(logits, Given()) for logits in (sft, reference)]
    whole = teacher_rows(rows, (2.0, -1.0), targets, candidates, K)
    monkeypatch.setattr("dense_reward.engines.teacher.engine.CPU_TILING", Tiling(2, VOCABULARY))
    monkeypatch.setattr("dense_reward.engines.teacher.engine.LEAST_ROWS", 1)
    parts = teacher_rows(rows, (2.0, -1.0), targets, candidates, K)
    for name in ("target_logprob_S", "likelier_S", "candidate_logprob_J", "top_ids_RK", "top_logprob_RK"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-6, err_msg=name)
