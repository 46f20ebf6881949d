"""Several pairs in one batch: each gets the scores it would get alone, and equal work is done once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from dense_reward.batching.deduplicate import ScoringTask, prepare_batch
from dense_reward.engines.torch.logprobs import (
    ModelRows,
    ScoredRows,
    Tiling,
    WantedIds,
    WantedLogits,
    score_pairs,
    score_rows,
)
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.records import TokenScores, Trunk, Wants
from faulty_engines import INFO, Recorder, trunk
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_trunk, tiny_model
from torch import Tensor

ALL = Wants(kl=True, entropy=True, varentropy=True, top_k=3)
TOLERANCE_NATS = 5e-5
OPTIONS = ComputeOptions(1000)


def model(seed: int) -> TorchModel:
    return TorchModel(tiny_model("llama", seed=seed, dtype=torch.float32))


def pair(sft: TorchModel, reference: TorchModel, options: ComputeOptions = OPTIONS) -> PairEngine:
    return PairEngine(sft, reference, INFO, options)


def counted(models: Sequence[TorchModel]) -> Counter[int]:
    """Counts the forwards of each model from now on, by its index."""
    forwards: Counter[int] = Counter()
    for place, counted_model in enumerate(models):
        counted_model.transformers_model.register_forward_pre_hook(lambda *_, place=place: forwards.update([place]))
    return forwards


def assert_scores(found: Sequence[Sequence[TokenScores]], tasks: Sequence[ScoringTask], wants: Wants = ALL) -> None:
    """The scores are those that each pair gives for the trunk alone."""
    assert len(found) == len(tasks)
    for branches, task in zip(found, tasks, strict=True):
        alone = task.engine.prepare([task.trunk], wants)()[0]
        for scores, expected in zip(branches, alone, strict=True):
            for column in fields(TokenScores):
                a, b = getattr(scores, column.name), getattr(expected, column.name)
                assert (a is None) == (b is None), column.name
                if a is not None and column.name not in {"top_ids_SK", "top_reference_logprob_SK"}:
                    np.testing.assert_allclose(a, b, atol=TOLERANCE_NATS, rtol=0, err_msg=column.name)


def test_one_sft_model_against_ten_references_is_eleven_forwards() -> None:
    models = [model(seed) for seed in range(11)]
    engines = [pair(models[0], reference) for reference in models[1:]]
    tasks = [ScoringTask(engine, random_trunk(seed, k=2)) for seed in range(3) for engine in engines]
    forwards = counted(models)
    found = prepare_batch(tasks, ALL)()
    assert forwards == dict.fromkeys(range(11), 1)
    assert_scores(found, tasks)


def test_a_model_may_be_the_reference_of_one_pair_and_the_sft_model_of_another() -> None:
    models = [model(seed) for seed in range(4)]
    engines = [pair(models[a], models[b]) for a, b in ((0, 1), (1, 2), (2, 1), (1, 1), (0, 2), (3, 0))]
    tasks = [ScoringTask(engine, random_trunk(1)) for engine in engines]
    found = prepare_batch(tasks, ALL)()
    assert_scores(found, tasks)
    same = found[3][0]
    assert not np.any(same.sft_logprob_S - same.reference_logprob_S)
    assert same.kl_S is not None
    assert not np.any(same.kl_S)


def test_pairs_that_are_computed_differently_do_not_share_a_forward() -> None:
    models = [model(seed) for seed in range(3)]
    engines = [
        pair(models[0], models[1]),
        pair(models[0], models[2], replace(OPTIONS, alone=True)),
        pair(models[0], models[1]),
    ]
    assert not engines[0].shares_with(engines[1])
    assert not engines[0].shares_with(pair(model(5), model(6)))
    assert engines[0].shares_with(engines[2])
    tasks = [ScoringTask(engine, random_trunk(0)) for engine in engines]
    assert_scores(prepare_batch(tasks, ALL)(), tasks)


@pytest.fixture(scope="module")
def engines() -> list[PairEngine]:
    models = [model(seed) for seed in range(4)]
    padded = ComputeOptions(1000, packed=False)
    made = [pair(models[a], models[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    return [*made, pair(models[0], models[3], padded), pair(models[3], models[0], padded)]


ASKS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=25)
@given(asked=ASKS, wants=st.sampled_from([Wants(), Wants(kl=True), ALL]))
def test_whatever_is_asked_of_whom_everybody_gets_the_scores_of_his_pair(
    engines: list[PairEngine], asked: list[tuple[int, int]], wants: Wants
) -> None:
    tasks = [ScoringTask(engines[which], random_trunk(seed, 5, (4, 0, 7), k=seed)) for which, seed in asked]
    assert_scores(prepare_batch(tasks, wants)(), tasks, wants)


def test_equal_trunks_of_a_batch_are_computed_once_for_all_who_ask() -> None:
    engine, other = Recorder(), Recorder()
    same: list[Trunk] = [trunk(1, 3, 4) for _ in range(3)]
    tasks = [
        ScoringTask(engine, same[0]),
        ScoringTask(engine, trunk(2, 3)),
        ScoringTask(engine, same[1]),
        ScoringTask(other, same[2]),
    ]
    found = prepare_batch(tasks, Wants())()
    assert (engine.names, other.names) == ([[1, 2]], [[1]])
    assert [len(branches) for branches in found] == [2, 1, 2, 2]
    assert found[0] is found[2]


def test_the_order_in_which_pairs_are_asked_does_not_matter() -> None:
    models = [model(seed) for seed in range(3)]
    first, second = pair(models[0], models[1]), pair(models[0], models[2])
    trunks = [random_trunk(seed) for seed in range(2)]
    tasks = [
        ScoringTask(first, trunks[0]),
        ScoringTask(second, trunks[0]),
        ScoringTask(second, trunks[1]),
        ScoringTask(first, trunks[1]),
    ]
    forwards = counted(models)
    found = prepare_batch(tasks, ALL)()
    assert forwards == {0: 1, 1: 1, 2: 1}
    assert_scores(found, tasks)


def test_trunks_that_differ_in_what_is_scored_or_named_are_not_equal() -> None:
    engine = Recorder()
    tasks = [ScoringTask(engine, random_trunk(0, masked=masked, k=k)) for masked in (False, True) for k in (0, 2)]
    prepare_batch(tasks, Wants())()
    assert [len(batch) for batch in engine.batches] == [4]


class Rows:
    """A head whose rows are its logits."""

    tiled = True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def logits(self, rows_CV: Tensor, tile: slice) -> Tensor:
        return rows_CV[:, tile].clone()

    def exact_logits(self, _: Tensor, __: Tensor) -> None:
        return None


PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(pairs=PAIRS, seed=st.integers(0, 2**32), wants=st.sampled_from([Wants(), Wants(kl=True), ALL]))
def test_pairs_scored_together_are_those_scored_alone(pairs: list[tuple[int, int]], seed: int, wants: Wants) -> None:
    random = torch.Generator().manual_seed(seed)
    models = [ModelRows(torch.randn(5, 17, generator=random, dtype=torch.float64), Rows(17)) for _ in range(4)]
    wanted = WantedIds(np.array([0, 4, 4, 2]), np.array([3, 16, 0, 3], dtype=np.int32))
    tiling = Tiling(2, 6)
    heads = [model.head for model in models]
    wanted_logits = WantedLogits(wanted, heads, models[0].rows_RX.device, tiling=tiling)
    together = score_pairs(models, pairs, wanted_logits, wants)
    for (sft, reference), found in zip(pairs, together, strict=True):
        alone = score_rows(models[sft], models[reference], wanted, wants, tiling=tiling)
        for column in fields(ScoredRows):
            a, b = getattr(found, column.name), getattr(alone, column.name)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b), column.name
