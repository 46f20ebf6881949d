"""Token arrays of two models: equal to float64 sums over the vocabulary, whatever the microbatches."""

import numpy as np
import pytest
import torch
from dense_reward.engines.fake import VOCABULARY
from dense_reward.records import IdArray
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl import token_arrays as module
from dense_reward_trainer.rl.token_arrays import token_arrays
from tiny_models import plain_logprobs
from tiny_policy import tiny_policy


def sequences(seed: int) -> tuple[list[IdArray], list[IdArray]]:
    random = np.random.default_rng(seed)
    return tuple(  # type: ignore[return-value]
        [random.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]
        for lengths in ((3, 9, 5, 1), (4, 1, 12, 7))
    )


@pytest.mark.parametrize(("microbatch_tokens", "states_together"), [(1, 128), (30, 5), (1000, 128), (1000, 5)])
def test_arrays_are_exact_sums_in_the_order_of_the_responses(
    monkeypatch: pytest.MonkeyPatch, microbatch_tokens: int, states_together: int
) -> None:
    monkeypatch.setattr(module, "STATES_TOGETHER", states_together)
    sft, reference = tiny_policy(seed=1), tiny_policy(seed=2)
    prompts, responses = sequences(0)
    found = token_arrays(sft, reference, prompts, responses, microbatch_tokens)
    for prompt, response, arrays in zip(prompts, responses, found, strict=True):
        own, other = (plain_logprobs(one.model, prompt, response).numpy() for one in (sft, reference))
        at = np.arange(len(response)), response
        probability, entropy = np.exp(own), -(np.exp(own) * own).sum(axis=1)
        kl = (probability * (own - other)).sum(axis=1)
        expected = {
            "sft_logprob": own[at],
            "entropy": entropy,
            "varentropy": (probability * own**2).sum(axis=1) - entropy**2,
            "largest_logprob": own.max(axis=1),
            "reward": own[at] - other[at],
            "kl": kl,
            "centred": own[at] - other[at] - kl,
        }
        for name, values in expected.items():
            assert getattr(arrays, name) == pytest.approx(values, abs=2e-3, rel=1e-4), name


def test_without_a_reference_only_the_arrays_of_the_sft_model_are_there() -> None:
    prompts, responses = sequences(1)
    found = token_arrays(tiny_policy(seed=1), None, prompts, responses, 100)
    assert [len(one.entropy) for one in found] == [len(ids) for ids in responses]
    assert all(one.reward is None and one.centred is None and one.kl is None for one in found)


def test_a_model_that_overflows_is_refused_with_the_cure() -> None:
    broken = tiny_policy(seed=2)
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(JobError, match=r"is not finite at some tokens: .*precision=float64"):
        token_arrays(tiny_policy(seed=1), broken, *sequences(2), 100)
