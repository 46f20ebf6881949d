"""The fake engine obeys every definition, so that tests of its users can compare with the definitions."""

import numpy as np
import pytest
from dense_reward import reward
from dense_reward.engines.fake import (
    BOS_ID,
    EOS_ID,
    VOCABULARY,
    FakeEngine,
    FakeTokenizer,
    state_logprobs,
    teacher_logprobs,
)
from dense_reward.records import Branch, Teacher, TokenScores, Trunk, Wants
from dense_reward.reward import candidate_reward
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

EVERYTHING = Wants(kl=True, entropy=True, varentropy=True, top_k=5)
IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4)


def branch(*ids: int, mask: list[bool] | None = None, candidates: NDArray[np.int32] | None = None) -> Branch:
    scored = np.ones(len(ids), dtype=bool) if mask is None else np.array(mask)
    return Branch(np.array(ids, dtype=np.int32), scored, candidates)


def trunk(prompt: list[int], *branches: Branch) -> Trunk:
    return Trunk(np.array(prompt, dtype=np.int32), branches)


def scored(prompt: list[int], one: Branch, wants: Wants = EVERYTHING) -> TokenScores:
    return FakeEngine().score([trunk(prompt, one)], wants)[0][0]


def every_id_at_each_of(states: int) -> NDArray[np.int32]:
    return np.tile(np.arange(VOCABULARY, dtype=np.int32), (states, 1))


@given(ids=IDS)
def test_each_state_is_a_distribution_of_its_own(ids: list[int]) -> None:
    for role in ("sft", "reference"):
        assert np.exp(state_logprobs(role, ids)).sum() == pytest.approx(1.0, abs=1e-12)
        assert (state_logprobs(role, ids) != state_logprobs(role, [*ids, 0])).any()
    assert (state_logprobs("sft", ids) != state_logprobs("reference", ids)).any()


@given(prompt=IDS, response=IDS)
@settings(deadline=None)
def test_quantities_are_those_of_the_states_before_each_token(prompt: list[int], response: list[int]) -> None:
    scores = scored(prompt, branch(*response, candidates=every_id_at_each_of(len(response))))
    for t, token in enumerate(response):
        sft_V, reference_V = (state_logprobs(role, [*prompt, *response[:t]]) for role in ("sft", "reference"))
        assert scores.sft_logprob_S[t] == np.float32(sft_V[token])
        assert scores.reference_logprob_S[t] == np.float32(reference_V[token])
        assert scores.kl_S is not None
        assert scores.kl_S[t] == pytest.approx(float((np.exp(sft_V) * (sft_V - reference_V)).sum()), rel=1e-6)
        assert scores.kl_S[t] >= 0
        assert scores.entropy_S is not None
        assert scores.entropy_S[t] == pytest.approx(float(-(np.exp(sft_V) * sft_V).sum()), rel=1e-6)
        assert 0 <= scores.entropy_S[t] <= np.log(VOCABULARY)
        assert scores.varentropy_S is not None
        deviation_V = sft_V + float(-(np.exp(sft_V) * sft_V).sum())
        assert scores.varentropy_S[t] == pytest.approx(float((np.exp(sft_V) * deviation_V**2).sum()), rel=1e-6)
        rewards_SK = candidate_reward(scores)
        assert rewards_SK is not None
        np.testing.assert_allclose(rewards_SK[t], sft_V - reference_V, atol=2e-6)
        assert scores.candidate_sft_logprob_SK is not None
        np.testing.assert_allclose(scores.candidate_sft_logprob_SK[t], sft_V, rtol=1e-6)


@given(prompt=IDS, response=IDS)
@settings(deadline=None)
def test_the_sft_model_expects_kl_as_its_reward_and_0_as_its_centred_reward(
    prompt: list[int], response: list[int]
) -> None:
    scores = scored(prompt, branch(*response, candidates=every_id_at_each_of(len(response))))
    rewards_SK = candidate_reward(scores)
    assert rewards_SK is not None
    assert scores.kl_S is not None
    for t in range(len(response)):
        probability_V = np.exp(state_logprobs("sft", [*prompt, *response[:t]]))
        assert probability_V @ rewards_SK[t] == pytest.approx(scores.kl_S[t], abs=1e-6)
        assert probability_V @ (rewards_SK[t] - scores.kl_S[t]) == pytest.approx(0, abs=1e-6)


@given(prompt=IDS, response=IDS)
@settings(deadline=None)
def test_alternatives_are_the_likeliest_ids_under_the_sft_model(prompt: list[int], response: list[int]) -> None:
    scores = scored(prompt, branch(*response))
    assert scores.top_ids_SK is not None
    assert scores.top_sft_logprob_SK is not None
    assert scores.top_reference_logprob_SK is not None
    for t in range(len(response)):
        sft_V, reference_V = (state_logprobs(role, [*prompt, *response[:t]]) for role in ("sft", "reference"))
        assert scores.top_sft_logprob_SK[t].tolist() == np.sort(sft_V)[::-1][:5].astype(np.float32).tolist()
        np.testing.assert_array_equal(scores.top_sft_logprob_SK[t], sft_V[scores.top_ids_SK[t]].astype(np.float32))
        np.testing.assert_array_equal(
            scores.top_reference_logprob_SK[t], reference_V[scores.top_ids_SK[t]].astype(np.float32)
        )


def test_the_sum_of_rewards_is_the_log_ratio_of_the_whole_response() -> None:
    prompt, response = [BOS_ID, 1], [5, 200, 7, EOS_ID]
    log_ratio = sum(
        sign * state_logprobs(role, [*prompt, *response[:t]])[token]
        for role, sign in (("sft", 1), ("reference", -1))
        for t, token in enumerate(response)
    )
    assert reward.summarise(reward.reward(scored(prompt, branch(*response)))).sum == pytest.approx(log_ratio, abs=1e-5)


def test_masked_tokens_are_context_and_not_scored() -> None:
    whole = scored([1], branch(2, 3, 4))
    masked = scored([1], branch(2, 3, 4, mask=[False, True, True]))
    assert masked.sft_logprob_S.tolist() == whole.sft_logprob_S[1:].tolist()


def test_results_do_not_depend_on_siblings_or_batch_mates() -> None:
    one, two = branch(2, 3), branch(4)
    together = FakeEngine().score([trunk([1], one, two), trunk([9], one)], EVERYTHING)
    assert [len(branches) for branches in together] == [2, 1]
    for scores, alone in zip(
        [*together[0], *together[1]], [scored([1], one), scored([1], two), scored([9], one)], strict=True
    ):
        assert scores.sft_logprob_S.tolist() == alone.sft_logprob_S.tolist()


def test_what_nobody_asked_for_is_not_computed() -> None:
    scores = scored([1], branch(2, 3), Wants())
    assert [scores.kl_S, scores.entropy_S, candidate_reward(scores), scores.top_ids_SK] == [None] * 4
    assert scores.varentropy_S is None


def test_an_empty_response_has_empty_arrays() -> None:
    scores = scored([1], branch())
    assert scores.sft_logprob_S.shape == (0,)
    assert scores.kl_S is not None
    assert scores.kl_S.shape == (0,)
    assert scores.top_ids_SK is not None
    assert scores.top_ids_SK.shape == (0, 5)


@given(st.binary(max_size=12))
def test_the_fake_tokenizer_has_an_id_per_byte(data: bytes) -> None:
    text, spans = FakeTokenizer().text_and_spans(list(data))
    assert text == data.decode(errors="replace")
    assert len(spans) == len(data)


@given(ids=IDS, tilt=st.floats(0.05, 5.0), seed=st.integers(0, 2**20))
def test_distilling_from_the_tilted_teacher_is_reward_less_kl_in_every_state(
    ids: list[int], tilt: float, seed: int
) -> None:
    """docs/distillation.md: for any two students, the objectives differ by the same amount."""
    sft_V, reference_V = state_logprobs("sft", ids), state_logprobs("reference", ids)
    teacher_V, beta = teacher_logprobs(Teacher(tilt), ids), 1 / tilt

    def difference(logits_V: NDArray[np.float64]) -> float:
        student_V = logits_V - np.logaddexp.reduce(logits_V)
        p_V = np.exp(student_V)
        distillation = beta * (p_V @ (student_V - teacher_V))
        dpr = p_V @ (sft_V - reference_V) - beta * (p_V @ (student_V - sft_V))
        return float(distillation + dpr)

    one_V, other_V = np.random.default_rng(seed).normal(size=(2, VOCABULARY))
    assert difference(one_V) == pytest.approx(difference(3 * other_V), abs=1e-9)
