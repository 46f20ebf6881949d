"""Sampling and log-probs of a policy: exact ids, one distribution for both, no influence of batch mates."""

import numpy as np
import pytest
import torch
from dense_reward.records import IdArray
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.policy import Policy, frozen_logprobs, microbatches, policy_logprobs
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.sampling import (
    Sampling,
    cut_at_end_of_turn,
    generation_config,
    left_padded,
    plain_generation,
    sample,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import ids_of, tiny_llama, tiny_policy
from transformers import GenerationConfig

PROMPTS = [ids_of(5, 6, 7), ids_of(9), ids_of(1, 2, 3, 4, 5, 6, 7, 8)]


@pytest.fixture
def policy() -> Policy:
    """A policy that ends its turn so often that finished and cut-off responses both occur."""
    policy = tiny_policy(dtype=torch.float64)
    policy.model.lm_head.weight.data[policy.end_of_turn_id] *= 2.0
    return policy


def ids_and_ends(rollouts: list[Rollout]) -> list[tuple[list[int], list[int], bool]]:
    return [(r.prompt_P.tolist(), r.response_T.tolist(), r.finished) for r in rollouts]


def test_every_prompt_gets_its_group_in_order(policy: Policy) -> None:
    rollouts = sample(policy, PROMPTS, Sampling(6, group_size=3), seed=1)
    assert [r.prompt_P.tolist() for r in rollouts] == [p.tolist() for p in PROMPTS for _ in range(3)]
    assert all(1 <= len(r.response_T) <= 6 and r.response_T.dtype == np.int32 for r in rollouts)


def test_a_response_ends_with_the_end_of_turn_or_is_cut_off_without_one(policy: Policy) -> None:
    rollouts = sample(policy, PROMPTS, Sampling(8, group_size=16), seed=1)
    for rollout in rollouts:
        assert rollout.finished == (rollout.response_T[-1] == policy.end_of_turn_id)
        assert policy.end_of_turn_id not in rollout.response_T[:-1]
        assert rollout.finished or len(rollout.response_T) == 8
    assert {rollout.finished for rollout in rollouts} == {True, False}


def test_the_seed_decides_what_is_drawn_and_the_global_random_state_is_left_alone(policy: Policy) -> None:
    torch.manual_seed(7)
    first = ids_and_ends(sample(policy, PROMPTS, Sampling(6, group_size=2), seed=1))
    drawn = torch.rand(3)
    torch.manual_seed(8)
    assert ids_and_ends(sample(policy, PROMPTS, Sampling(6, group_size=2), seed=1)) == first
    assert ids_and_ends(sample(policy, PROMPTS, Sampling(6, group_size=2), seed=2)) != first
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_recomputed_log_probs_are_those_of_generation(policy: Policy, temperature: float) -> None:
    sampling = Sampling(6, group_size=1, temperature=temperature)
    scoring = generation_config(policy, sampling)
    scoring.output_scores = scoring.return_dict_in_generate = True
    ids_BP, mask_BP = left_padded(PROMPTS, policy.device)
    with torch.random.fork_rng(), torch.no_grad(), plain_generation(policy.model):
        torch.manual_seed(3)
        output = policy.model.generate(input_ids=ids_BP, attention_mask=mask_BP, generation_config=scoring)
    drawn_BTV = torch.log_softmax(torch.stack(output.scores, dim=1).double(), -1)
    rollouts = sample(policy, PROMPTS, sampling, seed=3)
    logprob_BT = policy_logprobs(policy, PROMPTS, [r.response_T for r in rollouts], temperature).detach()
    for b, rollout in enumerate(rollouts):
        for t, token in enumerate(rollout.response_T.tolist()):
            assert output.sequences[b, ids_BP.shape[1] + t] == token
            assert float(logprob_BT[b, t]) == pytest.approx(float(drawn_BTV[b, t, token]), abs=2e-6)


def test_samples_follow_the_log_probs_that_are_recomputed() -> None:
    """The first token of many responses: frequencies against probabilities, by a chi-square over the likely ids."""
    policy = tiny_policy()
    draws = 4000
    rollouts = sample(policy, [ids_of(5)], Sampling(1, draws, temperature=1.3, batch_size=draws), seed=0)
    counts_V = np.bincount([int(r.response_T[0]) for r in rollouts], minlength=policy.vocab_size)
    everything = [ids_of(i) for i in range(policy.vocab_size)]
    probability_V = policy_logprobs(policy, [ids_of(5)] * len(everything), everything, 1.3).detach().exp()[:, 0].numpy()
    assert probability_V.sum() == pytest.approx(1.0, abs=1e-4)
    likely = probability_V * draws > 5
    chi_square = ((counts_V - draws * probability_V)[likely] ** 2 / (draws * probability_V[likely])).sum()
    assert chi_square < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_greedy_takes_the_likeliest_token_whatever_the_seed(policy: Policy) -> None:
    greedy = sample(policy, PROMPTS, Sampling(5, greedy=True), seed=1)
    assert ids_and_ends(sample(policy, PROMPTS, Sampling(5, greedy=True), seed=2)) == ids_and_ends(greedy)
    for rollout in greedy:
        for t, token in enumerate(rollout.response_T):
            state = np.concatenate([rollout.prompt_P, rollout.response_T[:t]])
            others = [ids_of(i) for i in range(policy.vocab_size)]
            logprob_V1 = frozen_logprobs(policy, [state] * len(others), others, 4096)
            assert int(logprob_V1[:, 0].argmax()) == token


def test_a_checkpoints_own_generation_settings_do_not_reach_the_samples(policy: Policy) -> None:
    plain = ids_and_ends(sample(policy, PROMPTS, Sampling(6, group_size=2), seed=1))
    shipped = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, temperature=0.1, min_p=0.5)
    policy.model.generation_config = shipped
    assert ids_and_ends(sample(policy, PROMPTS, Sampling(6, group_size=2), seed=1)) == plain
    assert policy.model.generation_config is shipped


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn_but_have_their_share_as_at_the_service() -> None:
    """Output layers often have rows beyond the tokenizer. The service refuses their ids, but normalises over them."""
    policy = Policy(tiny_llama(vocab_size=64), end_of_turn_id=3, vocab_size=5)
    rollouts = sample(policy, [ids_of(1)], Sampling(8, group_size=16), seed=0)
    assert max(int(r.response_T.max()) for r in rollouts) < 5
    rows = [ids_of(i) for i in range(64)]
    probability_V = policy_logprobs(policy, [ids_of(1)] * 64, rows).detach().exp()[:, 0]
    assert float(probability_V.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(probability_V[:5].sum()) < 0.9


def test_log_probs_of_a_padded_batch_are_those_of_each_response_alone(policy: Policy) -> None:
    rollouts = sample(policy, PROMPTS, Sampling(7, group_size=2), seed=4)
    prompts, responses = [r.prompt_P for r in rollouts], [r.response_T for r in rollouts]
    together_BT = policy_logprobs(policy, prompts, responses).detach()
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        alone_1T = policy_logprobs(policy, [prompt], [response]).detach()
        torch.testing.assert_close(together_BT[b, : len(response)], alone_1T[0], rtol=0, atol=1e-9)
        assert not together_BT[b, len(response) :].any()


def test_log_probs_are_those_of_the_models_own_logits(policy: Policy) -> None:
    prompt, response = ids_of(5, 6), ids_of(7, 8, 9)
    logits_LV = policy.model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0]
    expected_T = torch.log_softmax(logits_LV[1:4] / 0.5, -1)[torch.arange(3), torch.tensor([7, 8, 9])]
    torch.testing.assert_close(policy_logprobs(policy, [prompt], [response], 0.5)[0], expected_T, rtol=0, atol=1e-12)


def test_the_gradient_of_microbatches_adds_up_to_that_of_the_batch(policy: Policy) -> None:
    rollouts = sample(policy, PROMPTS, Sampling(7, group_size=2), seed=4)
    prompts, responses = [r.prompt_P for r in rollouts], [r.response_T for r in rollouts]

    def gradient(tokens: int) -> torch.Tensor:
        policy.model.zero_grad()
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        for rows in microbatches(lengths, tokens):
            part = policy_logprobs(policy, [prompts[b] for b in rows], [responses[b] for b in rows])
            torch.autograd.backward(part.sum())
        return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(12), gradient(10_000), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 100))
def test_microbatches_hold_every_row_once_and_stay_within_their_tokens(lengths: list[int], tokens: int) -> None:
    batches = list(microbatches(lengths, tokens))
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= tokens


@pytest.mark.parametrize(
    ("generated", "kept", "finished"),
    [([4, 2, 2, 2], [4, 2], True), ([2, 4], [2], True), ([4, 5], [4, 5], False), ([4, 2], [4, 2], True)],
)
def test_a_response_is_cut_after_its_first_end_of_turn(generated: list[int], kept: list[int], finished: bool) -> None:
    response_T, is_finished = cut_at_end_of_turn(ids_of(*generated), end_of_turn_id=2)
    assert (response_T.tolist(), is_finished) == (kept, finished)


@pytest.mark.parametrize(
    ("prompt", "complaint"), [(ids_of(), "prompt 1 is empty"), (ids_of(*[1] * 100), "lower max_new_tokens to 28")]
)
def test_prompts_that_leave_nothing_to_sample_are_refused(policy: Policy, prompt: IdArray, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        sample(policy, [ids_of(1), prompt], Sampling(50), seed=0)


def test_under_autocast_weights_stay_float32_and_both_sides_compute_alike() -> None:
    full = tiny_policy()
    half = Policy(full.model, full.end_of_turn_id, full.vocab_size, autocast=True)
    response = [ids_of(7, 8, 9)]
    exact, rounded = (policy_logprobs(p, [ids_of(5, 6)], response) for p in (full, half))
    assert half.model.dtype == torch.float32
    assert rounded.dtype == torch.float32
    assert 0 < float((exact - rounded).detach().abs().max()) < 0.5


@pytest.mark.gpu
def test_a_gpu_gives_the_log_probs_of_the_cpu_and_samples_by_seed(policy: Policy) -> None:
    responses = [r.response_T for r in sample(policy, PROMPTS, Sampling(7), seed=4)]
    expected_BT = policy_logprobs(policy, PROMPTS, responses).detach()
    policy.model.to("cuda")
    # Llama's norms compute in float32 whatever the dtype.
    torch.testing.assert_close(
        policy_logprobs(policy, PROMPTS, responses).detach().cpu(), expected_BT, rtol=0, atol=1e-5
    )
    first, again = (ids_and_ends(sample(policy, PROMPTS, Sampling(7, group_size=2), seed=4)) for _ in range(2))
    assert first == again
