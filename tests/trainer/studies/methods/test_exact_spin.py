"""One exact round of SPIN reaches its closed form."""

import pytest
import torch
from dense_reward_trainer.selfplay.losses import pair_losses
from dense_reward_trainer.studies.methods import exact_spin
from dense_reward_trainer.studies.methods.exact_spin import response_logprobs, spin_round, spin_round_error, states


@pytest.mark.parametrize("seed", [0, 1])
def test_one_round_tilts_the_model_towards_the_data_as_the_theorem_says(seed: int) -> None:
    assert spin_round_error(seed) < 1e-6


def test_the_error_is_that_of_another_exponent_if_the_loss_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_spin, "pair_losses", lambda loss, d, g, beta: pair_losses(loss, d, g, 1.1 * beta))
    assert spin_round_error() > 1e-3


def test_at_lambda_1_the_model_reaches_the_data() -> None:
    torch.manual_seed(3)
    data_SV, start_SV = torch.randn(2, len(states()), exact_spin.VOCABULARY, dtype=torch.float64)
    reached_R = spin_round(start_SV, response_logprobs(data_SV), 1.0)
    torch.testing.assert_close(reached_R, response_logprobs(data_SV), atol=1e-6, rtol=0.0)


def test_the_responses_are_all_there_are() -> None:
    logprob_R = response_logprobs(torch.randn(len(states()), exact_spin.VOCABULARY, dtype=torch.float64))
    assert len(logprob_R) == 1 + 2 + 4 + 8
    assert float(logprob_R.exp().sum()) == pytest.approx(1.0)
