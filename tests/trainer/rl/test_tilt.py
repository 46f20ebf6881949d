"""The tilted policy: its formula, and that what is sampled is what is measured."""

import numpy as np
import pytest
import torch
from dense_reward_trainer.rl.policy import Policy, frozen_logprobs
from dense_reward_trainer.rl.sampling import Sampling, sample, sampled_logprobs
from dense_reward_trainer.rl.tilt import Tilt
from tiny_policy import ids_of, tiny_llama, tiny_policy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

PROMPTS = [ids_of(5, 6, 7), ids_of(9), ids_of(1, 2, 3, 4, 5, 6, 7, 8)]


def tiny_gpt2(seed: int) -> GPT2LMHeadModel:
    """A model with absolute positions: padding on the left must not shift them."""
    config = GPT2Config(
        vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(20.0)
    return model.eval()


def tilted(model: PreTrainedModel, reference: PreTrainedModel, strength: float, vocab_size: int) -> Policy:
    return Policy(model, end_of_turn_id=2, vocab_size=vocab_size, tilt=Tilt(reference, strength))


def test_the_log_probs_are_those_of_the_formula() -> None:
    policy, reference = tiny_policy(dtype=torch.float64), tiny_policy(seed=1, dtype=torch.float64)
    state, vocab = [5, 6], policy.vocab_size
    ids = [ids_of(i) for i in range(vocab)]
    sft_V, ref_V = (frozen_logprobs(p, [ids_of(*state)] * vocab, ids, 4096)[:, 0].exp() for p in (policy, reference))
    weight_V = sft_V * (sft_V / ref_V) ** 0.7
    both = tilted(policy.model, reference.model, 0.7, vocab)
    found_V = frozen_logprobs(both, [ids_of(*state)] * vocab, ids, 4096)[:, 0].exp()
    torch.testing.assert_close(found_V, weight_V / weight_V.sum(), rtol=1e-9, atol=1e-12)


def test_ids_that_neither_model_gives_are_not_sampled_and_spoil_no_other() -> None:
    sft_NV = torch.tensor([[0.6, 0.4, 0.0, 0.0]], dtype=torch.float64).log()
    reference_NV = torch.tensor([[0.3, 0.4, 0.3, 0.0]], dtype=torch.float64).log()
    found_NV = Tilt(tiny_llama(), 1.0)(sft_NV, reference_NV).exp()
    torch.testing.assert_close(found_NV, torch.tensor([[0.75, 0.25, 0.0, 0.0]], dtype=torch.float64))


def test_a_tilt_away_from_oneself_changes_nothing() -> None:
    policy = tiny_policy()
    both = tilted(policy.model, policy.model, 2.0, policy.vocab_size)
    response = [ids_of(7, 8, 9)]
    one, other = (frozen_logprobs(p, [ids_of(5)], response, 4096) for p in (policy, both))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_greedy_answers_are_the_likeliest_tokens_of_the_recomputed_log_probs(model: str) -> None:
    """In a batch with padding on the left and the cache of the reference."""
    policy = gpt2_pair() if model == "gpt2" else llama_pair()
    for rollout in sample(policy, PROMPTS, Sampling(6, greedy=True), seed=0):
        for t, token in enumerate(rollout.response_T):
            state = np.concatenate([rollout.prompt_P, rollout.response_T[:t]])
            ids = [ids_of(i) for i in range(policy.vocab_size)]
            assert int(frozen_logprobs(policy, [state] * len(ids), ids, 4096)[:, 0].argmax()) == token


def test_greedy_answers_of_the_tilted_policy_are_not_those_of_its_model() -> None:
    policy = llama_pair()
    alone = Policy(policy.model, policy.end_of_turn_id, policy.vocab_size)
    both, one = (
        [r.response_T.tolist() for r in sample(p, PROMPTS, Sampling(6, greedy=True), 0)] for p in (policy, alone)
    )
    assert both != one


def gpt2_pair() -> Policy:
    return tilted(tiny_gpt2(0), tiny_gpt2(1), 1.0, 32)


def llama_pair() -> Policy:
    sft, reference = (tiny_llama(seed=seed, vocab_size=32, dtype=torch.float64) for seed in (0, 1))
    return tilted(sft, reference, 1.0, 32)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, 3000, 1.0, batch_size=3000),
        Sampling(1, 3000, 1.7, batch_size=3000),
        Sampling(1, 3000, 2.0, batch_size=3000, top_p=0.9),
        Sampling(1, 3000, 2.0, batch_size=3000, min_p=0.05),
        Sampling(1, 3000, 3.0, batch_size=3000, top_p=0.95, min_p=0.02),
    ],
    ids=["plain", "temperature", "top_p", "min_p", "all"],
)
@pytest.mark.parametrize("tilt", [True, False], ids=["tilted", "untilted"])
def test_samples_follow_the_log_probs_that_are_measured(sampling: Sampling, tilt: bool) -> None:
    """The second token of a response, after a state in the reference's cache: frequencies against probabilities."""
    policy = llama_pair()
    if not tilt:
        policy = Policy(policy.model, policy.end_of_turn_id, policy.vocab_size)
    rollouts = sample(policy, [ids_of(5, 9)], sampling, seed=0)
    counts_V = np.bincount([int(r.response_T[0]) for r in rollouts], minlength=32)
    logprob_B = sampled_logprobs(policy, rollouts, sampling, 4096)[:, 0]
    expected_V = np.zeros(32)
    for rollout, logprob in zip(rollouts, logprob_B.tolist(), strict=True):
        expected_V[int(rollout.response_T[0])] = 3000 * np.exp(logprob)
    assert expected_V.sum() == pytest.approx(3000, rel=0.01 if sampling.truncates else 0.02)
    likely = expected_V > 5
    chi_square = ((counts_V - expected_V)[likely] ** 2 / expected_V[likely]).sum()
    assert likely.sum() > 2
    assert chi_square < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_measured_log_probs_of_longer_samples_are_those_at_generation() -> None:
    """Teacher-forced in one pass, against a pass over each prefix alone."""
    policy, sampling = gpt2_pair(), Sampling(5, 4, 1.5, top_p=0.8)
    rollouts = sample(policy, PROMPTS, sampling, seed=3)
    logprob_BT = sampled_logprobs(policy, rollouts, sampling, 64)
    assert bool(torch.isfinite(logprob_BT).all())
    for b, rollout in enumerate(rollouts[:4]):
        for t, token in enumerate(rollout.response_T):
            state = np.concatenate([rollout.prompt_P, rollout.response_T[:t]])
            ids = [ids_of(i) for i in range(32)]
            probability_V = frozen_logprobs(policy, [state] * 32, ids, 4096, 1.5)[:, 0].exp()
            order_V = probability_V.argsort(descending=True)
            before_V = probability_V[order_V].cumsum(0) - probability_V[order_V]
            kept = order_V[before_V < 0.8]
            expected = float((probability_V[token] / probability_V[kept].sum()).log())
            assert float(logprob_BT[b, t]) == pytest.approx(expected, abs=1e-6)


def test_the_shorter_one_of_two_models_limits_the_length() -> None:
    policy = gpt2_pair()
    longer = tiny_llama(vocab_size=32)
    assert Policy(longer, 2, 32, tilt=Tilt(policy.model, 1.0)).limit_tokens == 64
