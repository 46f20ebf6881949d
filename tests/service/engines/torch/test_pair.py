"""PairEngine: scores do not depend on the rest of the batch, within rounding, or to the bit with `alone`."""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
from dense_reward.batching.deduplicate import ScoringTask, prepare_batch
from dense_reward.engines.torch.model import TorchModel
from dense_reward.engines.torch.pair import ComputeOptions, PairEngine
from dense_reward.records import Branch, TokenScores, Trunk, Wants
from dense_reward.reward import candidate_reward
from faulty_engines import INFO
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_configs import LONG_TOKENS, PADDED
from tiny_models import continued, plain_logprobs, random_trunk, tiny_model

pytestmark = pytest.mark.slow

ALL = Wants(kl=True, entropy=True, varentropy=True, top_k=3)
TOLERANCE_NATS = 5e-5
"""Rounding between a sequence alone and in any batch, in float32, on models whose log-probs spread over nats."""


def engine_of(
    name: str, *, max_batch_tokens: int = 1000, dtype: torch.dtype = torch.float32, alone: bool = False
) -> PairEngine:
    sft, reference = (TorchModel(tiny_model(name, seed=seed, dtype=dtype)) for seed in (1, 2))
    return PairEngine(sft, reference, INFO, ComputeOptions(max_batch_tokens, packed=name not in PADDED, alone=alone))


def alone(engine: PairEngine, trunk: Trunk, branch: Branch) -> TokenScores:
    return engine.score([Trunk(trunk.prompt_P, (branch,))], ALL)[0][0]


def assert_same(found: TokenScores, expected: TokenScores) -> None:
    """Compare all but the ids of the likeliest tokens, which rounding can exchange."""
    for field in fields(TokenScores):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None), field.name
        if a is not None and field.name not in {"top_ids_SK", "top_reference_logprob_SK"}:
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, atol=TOLERANCE_NATS, rtol=0, err_msg=field.name)


@st.composite
def batches(draw: st.DrawFn) -> list[Trunk]:
    """Prompts with two or more responses each, of unequal lengths, some empty, some masked."""
    return [
        random_trunk(
            draw(st.integers(0, 2**20)),
            draw(st.integers(1, 40)),
            tuple(draw(st.lists(st.integers(0, 30), min_size=2, max_size=4))),
            masked=draw(st.booleans()),
            k=draw(st.integers(0, 3)),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]


@cache
def small_batches(name: str = "llama") -> PairEngine:
    """An engine that is shared by tests, with so few tokens a batch that most calls need several."""
    return engine_of(name, max_batch_tokens=150)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "mixtral", "gpt-oss", "minicpm3", "longrope", "lfm2", "bloom"]
)
# derandomize: rarely, rounding sends a token to another expert, which changes its scores by more than the tolerance
@settings(deadline=None, max_examples=8, derandomize=True)
@given(trunks=batches())
def test_a_sequence_gets_the_same_scores_in_any_batch(name: str, trunks: list[Trunk]) -> None:
    engine = small_batches(name)
    scores = engine.score(trunks, ALL)
    assert [len(branches) for branches in scores] == [len(trunk.branches) for trunk in trunks]
    for trunk, of_trunk in zip(trunks, scores, strict=True):
        for branch, found in zip(trunk.branches, of_trunk, strict=True):
            assert len(found.sft_logprob_S) == branch.scored_T.sum()
            assert_same(found, alone(engine, trunk, branch))


def test_the_scores_are_those_of_plain_transformers() -> None:
    sft, reference = (tiny_model("llama", seed=seed, dtype=torch.float32) for seed in (1, 2))
    trunk = random_trunk(4, 11, (9, 0, 14), masked=True, k=2)
    for branch, found in zip(trunk.branches, small_batches().score([trunk], ALL)[0], strict=True):
        p, q = (
            plain_logprobs(model, trunk.prompt_P, branch.ids_T)[torch.from_numpy(branch.scored_T)]
            for model in (sft, reference)
        )
        ids_S1 = torch.from_numpy(branch.ids_T[branch.scored_T]).long()[:, None]
        candidates_SK = torch.from_numpy(branch.candidates_SK).long()
        assert found.kl_S is not None
        assert found.candidate_sft_logprob_SK is not None
        rewards_SK = candidate_reward(found)
        assert rewards_SK is not None
        np.testing.assert_allclose(found.candidate_sft_logprob_SK, p.gather(1, candidates_SK).numpy(), atol=1e-4)
        np.testing.assert_allclose(rewards_SK, (p - q).gather(1, candidates_SK).numpy(), atol=1e-4)
        np.testing.assert_allclose(found.sft_logprob_S, p.gather(1, ids_S1)[:, 0].numpy(), atol=1e-4)
        np.testing.assert_allclose(found.reference_logprob_S, q.gather(1, ids_S1)[:, 0].numpy(), atol=1e-4)
        np.testing.assert_allclose(found.kl_S, (p.exp() * (p - q)).sum(1).numpy(), atol=1e-4)


def test_sequences_on_both_sides_of_a_rope_length_limit_are_each_rotated_for_their_own_length() -> None:
    short, long = random_trunk(1, 10, (5, LONG_TOKENS - 10)), random_trunk(2, 10, (LONG_TOKENS - 9, 40))
    together = small_batches("longrope").score([short, long], Wants())
    plain = tiny_model("longrope", seed=1, dtype=torch.float32)
    for trunk, of_trunk in zip((short, long), together, strict=True):
        for branch, found in zip(trunk.branches, of_trunk, strict=True):
            ids_S1 = torch.from_numpy(branch.ids_T).long()[:, None]
            expected = plain_logprobs(plain, trunk.prompt_P, branch.ids_T).gather(1, ids_S1)[:, 0]
            np.testing.assert_allclose(found.sft_logprob_S, expected.numpy(), atol=1e-4)


def test_arrays_come_in_the_dtypes_of_the_contract_and_only_where_asked_for() -> None:
    engine = engine_of("llama", dtype=torch.float64)
    trunk = random_trunk(0, 3, (4, 0), k=2)
    for scores in engine.score([trunk], ALL)[0]:
        assert scores.value_S is None, "only a token head has values"
        names = {field.name for field in fields(TokenScores)} - {"value_S", "teacher"}
        dtypes = {name: getattr(scores, name).dtype for name in names}
        assert dtypes.pop("top_ids_SK") == np.int32
        assert set(dtypes.values()) == {np.dtype(np.float32)}
    plain = engine.score([random_trunk(0, 3, (4,))], Wants())[0][0]
    assert [f.name for f in fields(TokenScores) if getattr(plain, f.name) is not None] == [
        "sft_logprob_S",
        "reference_logprob_S",
    ]


def test_each_branch_gets_the_candidates_that_it_named_whatever_its_mates_name() -> None:
    many, few, none = (random_trunk(seed, 5, (6, 3), k=k) for seed, k in ((1, 5), (2, 1), (3, 0)))
    scores = small_batches().score([many, none, few], Wants())
    rewards = [[candidate_reward(branch) for branch in branches] for branches in scores]
    widths = [[None if rewards_SK is None else rewards_SK.shape for rewards_SK in row] for row in rewards]
    assert widths == [[(6, 5), (3, 5)], [None, None], [(6, 1), (3, 1)]]
    alone_few = candidate_reward(small_batches().score([few], Wants())[0][0])
    found = rewards[2][0]
    assert found is not None
    assert alone_few is not None
    np.testing.assert_allclose(found, alone_few, atol=TOLERANCE_NATS)


def test_prompts_that_are_equal_are_shared_and_their_branches_keep_their_own_scores() -> None:
    trunks = [random_trunk(seed, 12, (5, 9, 1)) for seed in range(3)]
    same = [replace(trunk, prompt_P=trunks[0].prompt_P) for trunk in trunks]
    together = small_batches().score([same[0], trunks[1], same[1], same[2]], ALL)
    for of_trunk, trunk in zip(together, (same[0], trunks[1], same[1], same[2]), strict=True):
        for found, branch in zip(of_trunk, trunk.branches, strict=True):
            assert_same(found, alone(small_batches(), trunk, branch))


def with_mates(trunk: Trunk, random: Random) -> tuple[list[Trunk], list[int]]:
    """A batch that ends with the trunk, shuffled among new siblings, after other trunks, some of them with its prompt.

    Also returns the new index of each of the trunk's own branches.
    """
    mates = [random_trunk(random.randrange(99), random.randint(1, 30), (random.randint(1, 20),) * 2) for _ in range(2)]
    mates += [replace(mate, prompt_P=trunk.prompt_P) for mate in mates]
    siblings = [branch for mate in mates for branch in mate.branches]
    mixed = list(enumerate([*trunk.branches, *random.sample(siblings, random.randint(0, 8))]))
    random.shuffle(mixed)
    order = [i for i, _ in mixed]
    places = [order.index(i) for i in range(len(trunk.branches))]
    return [*random.sample(mates, random.randint(0, 4)), Trunk(trunk.prompt_P, tuple(b for _, b in mixed))], places


BATCHES = 5  # without `alone`, the first of them already changes bits of every architecture in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss", "mixtral", "lfm2"])
def test_alone_a_sequence_has_the_same_scores_to_the_bit_in_any_batch(name: str, dtype: torch.dtype) -> None:
    engine, random = engine_of(name, dtype=dtype, alone=True), Random(0)
    trunk = random_trunk(7, 13, (11, 4, 11, 1))
    expected = [alone(engine, trunk, branch) for branch in trunk.branches]
    for _ in range(BATCHES):
        batch, places = with_mates(trunk, random)
        found = engine.score(batch, ALL)[-1]
        for place, scores in zip(places, expected, strict=True):
            assert bits(found[place]) == bits(scores)


def bits(scores: TokenScores) -> Sequence[bytes]:
    return [array.tobytes() for field in fields(TokenScores) if (array := getattr(scores, field.name)) is not None]


def test_what_else_a_batch_wants_changes_no_bit_of_the_log_probs() -> None:
    engine, trunk = engine_of("llama", alone=True), random_trunk(7, 13, (11, 4))
    bare, full = (engine.score([trunk], wants)[0] for wants in (Wants(), ALL))
    for one, other in zip(bare, full, strict=True):
        assert one.sft_logprob_S.tobytes() == other.sft_logprob_S.tobytes()
        assert one.reference_logprob_S.tobytes() == other.reference_logprob_S.tobytes()


def test_packed_and_alone_differ_by_rounding_only() -> None:
    trunk = random_trunk(7, 13, (11, 4, 11))
    packed, separate = (e.score([trunk], ALL)[0] for e in (small_batches("gemma2"), engine_of("gemma2", alone=True)))
    for found, expected in zip(packed, separate, strict=True):
        assert_same(found, expected)


def test_a_head_that_was_copied_to_where_the_logits_meet_gives_the_same_to_the_bit() -> None:
    """A reference on a separate device is served so."""
    trunk = random_trunk(3, 9, (6, 11), k=2)
    sft, reference = (TorchModel(tiny_model("gemma2", seed=seed, dtype=torch.float32)) for seed in (1, 2))
    reference.use_head(device=sft.device, dtype=None)
    moved = PairEngine(sft, reference, INFO, ComputeOptions(150)).score([trunk], ALL)[0]
    for found, expected in zip(moved, small_batches("gemma2").score([trunk], ALL)[0], strict=True):
        assert bits(found) == bits(expected)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_work_knows_how_many_tokens_go_through_the_models(*, packed: bool) -> None:
    """A prompt of 30 tokens with responses of 20 and 9, and the next turn of the first; no last token is computed."""
    first = random_trunk(1, 30, (20, 9))
    (second,) = continued(first, random_trunk(2, 4, (6,)))
    models = [TorchModel(tiny_model("llama", seed=seed)) for seed in (1, 2)]
    pair, other = (PairEngine(models[0], models[1], INFO, ComputeOptions(1000, packed=packed)) for _ in range(2))
    alone = (30 + 19) + (30 + 8) + (54 + 5)

    def counted(*tasks: ScoringTask) -> int:
        work = prepare_batch(tasks, Wants())
        assert work.tokens is not None
        return work.tokens

    together = counted(ScoringTask(pair, first), ScoringTask(pair, second))
    assert together == (54 + 5 + 8 if packed else alone)
    apart = counted(ScoringTask(pair, first), ScoringTask(other, second))
    assert apart == ((30 + 19 + 8) + (54 + 5) if packed else alone)
