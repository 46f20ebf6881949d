"""Signals of tokens: their formulas, what they request, and what an engine can offer."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from dense_reward import ScoredResponse
from dense_reward.client.scored_response import Alternative
from dense_reward.schemas import ModelCard
from dense_reward_trainer.configs.signals import TokenSignal
from dense_reward_trainer.credit.signals import ARRAYS, FROM_REFERENCE, ONE_MODEL, SIGNALS, offered, request_for
from dense_reward_trainer.credit.signals import token_signals as signals_of
from dense_reward_trainer.errors import JobError
from numpy.typing import NDArray

SFT_V = np.array([0.7, 0.2, 0.1])
REFERENCE_V = np.array([0.25, 0.25, 0.5])
ENTROPY = float(-(SFT_V * np.log(SFT_V)).sum())
KL = float((SFT_V * np.log(SFT_V / REFERENCE_V)).sum())
VARENTROPY = float((SFT_V * (np.log(SFT_V) + ENTROPY) ** 2).sum())


def scored() -> ScoredResponse:
    """A response with one token for each id of a vocabulary of three, all drawn in the same state."""
    logprob_T, reference_T = np.log(SFT_V).astype(np.float32), np.log(REFERENCE_V).astype(np.float32)
    fields = {
        "sft_logprob": logprob_T,
        "reward": logprob_T - reference_T,
        "centred": logprob_T - reference_T - np.float32(KL),
        "entropy": np.full(3, ENTROPY, np.float32),
        "varentropy": np.full(3, VARENTROPY, np.float32),
        "alternatives": ((Alternative(0, "a", float(logprob_T[0]), 0.0),),) * 3,
    }
    return cast(ScoredResponse, SimpleNamespace(**fields))


def test_each_signal_is_that_of_its_formula() -> None:
    found = signals_of(scored(), SIGNALS)
    logprob_V = np.log(SFT_V)
    expected: dict[TokenSignal, NDArray[np.float64]] = {
        "sft_logprob": logprob_V,
        "entropy_corrected": logprob_V + ENTROPY,
        "z_score": (logprob_V + ENTROPY) / np.sqrt(VARENTROPY + 0.001),
        "margin": logprob_V - logprob_V[0],
        "reward": logprob_V - np.log(REFERENCE_V),
        "centred": logprob_V - np.log(REFERENCE_V) - KL,
    }
    assert list(found) == list(SIGNALS) == list(expected)
    for name, values_V in expected.items():
        assert found[name] == pytest.approx(values_V, abs=1e-6), name


@pytest.mark.parametrize("name", ["entropy_corrected", "z_score", "centred"])
def test_a_signal_with_mean_zero_in_every_state_has_it(name: TokenSignal) -> None:
    assert float(SFT_V @ signals_of(scored(), [name])[name]) == pytest.approx(0.0, abs=1e-6)


def test_where_only_one_token_is_possible_the_z_score_of_it_is_no_rounding() -> None:
    arrays = {"sft_logprob": -1e-6, "entropy": 2e-6, "varentropy": 0.0}
    certain = SimpleNamespace(**{name: np.array([value], np.float32) for name, value in arrays.items()})
    assert abs(float(signals_of(cast(ScoredResponse, certain), ["z_score"])["z_score"][0])) < 1e-4


def test_only_what_signals_need_is_requested() -> None:
    assert request_for(["sft_logprob"]).include == ("sft_logprob",)
    assert request_for(["reward", "centred"]).include == ("centred", "reward")
    both = request_for(["entropy_corrected", "margin"])
    assert (both.include, both.top_k) == (("entropy", "sft_logprob"), 1)
    assert request_for(["entropy_corrected"]).top_k == 0
    assert "varentropy" in request_for(SIGNALS).include


def card(quantities: set[str]) -> ModelCard:
    return ModelCard.model_construct(name="pair", quantities=sorted(quantities))


def test_an_engine_offers_the_signals_whose_arrays_it_computes() -> None:
    everything = {"kl", "centred", "entropy", "varentropy", "candidate_reward", "alternatives"}
    assert offered(card(everything)) == SIGNALS
    assert offered(card(everything - {"varentropy"})) == tuple(name for name in SIGNALS if name != "z_score")
    assert offered(card({"candidate_reward"})) == ("sft_logprob", "reward")
    assert offered(ModelCard.model_construct(token_head="head", quantities=[])) == ("reward",)
    assert set(FROM_REFERENCE) | set(ONE_MODEL) == set(ARRAYS) == set(SIGNALS)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_missing_array_is_refused_by_name(name: TokenSignal) -> None:
    for array in ARRAYS[name]:
        partial = scored()
        setattr(partial, array, None)
        with pytest.raises(JobError, match=f"the service returned no {array}"):
            signals_of(partial, [name])
