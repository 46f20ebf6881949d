"""Signals that a pair cannot compute are refused before anything is sampled."""

import pytest
from dense_reward import Client
from dense_reward.schemas import ModelCard
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.policies.signals import check_offered
from dense_reward_trainer.rl.reward_service import PinnedPair


def test_a_signal_that_the_engine_does_not_compute_is_refused_with_those_that_it_does() -> None:
    with Client("http://127.0.0.1:9") as client:
        pair = PinnedPair(client, ModelCard.model_construct(name="base", quantities=["kl", "centred"]), 1000)
        check_offered(pair, {"reward", "sft_logprob", "centred"})
        with pytest.raises(
            ConfigError, match=r"cannot compute margin for the pair base: .*sft_logprob, reward, centred"
        ):
            check_offered(pair, {"reward", "margin"})
