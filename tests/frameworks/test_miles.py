"""miles' own conversion of samples and its code of advantages, with a running service.

Megatron and SGLang are stand-ins: miles' code that calls them does not run here.
"""

from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
from program_source import SFT, URL, source, stand_ins

pytest.importorskip("ray", reason="needs ray: make test-frameworks")
source("miles")
stand_ins("megatron", "sglang", "sglang_router")

from dense_reward import Client, ScoreOptions  # noqa: E402 - after the skips
from dense_reward_trainer.errors import ConfigError, JobError  # noqa: E402
from miles.backends.training_utils import loss  # noqa: E402
from miles.ray.rollout.train_data_conversion import convert_samples_to_train_data  # noqa: E402
from miles.utils.misc import load_function  # noqa: E402
from miles.utils.types import Sample  # noqa: E402

FETCH = load_function("dense_reward_trainer.integrations.miles.fetch")
PROMPT = [1, 5, 6]
ANSWERS = [[40, 41, 42, 43], [40, 44]]


def settings(**changed: object) -> Namespace:
    given: dict[str, object] = {
        "hf_checkpoint": SFT,
        "rollout_temperature": 1.0,
        "use_opd": True,
        "opd_type": "sglang",
        "opd_kl_coef": 1.0,
        "advantage_estimator": "grpo",
        "kl_coef": 0.0,
        "reward_key": None,
        "use_rollout_logprobs": True,
        "skip_actor_forward_only": False,
        "normalize_advantages": False,
        "use_dynamic_global_batch_size": False,
        "dense_reward": {"service_url": URL, "kl_coefficient": 0.0},
    }
    return Namespace(**given | changed)


def samples() -> list[Sample]:
    return [
        Sample(
            group_index=0,
            index=index,
            tokens=PROMPT + answer,
            response_length=len(answer),
            reward=float(index),
            status=Sample.Status.COMPLETED,
        )
        for index, answer in enumerate(ANSWERS)
    ]


def test_miles_trains_on_the_advantages_of_the_job() -> None:
    data: dict[str, Any] = convert_samples_to_train_data(settings(), samples(), {}, None, FETCH)
    assert data["raw_reward"] == [0.0, 1.0]
    for sample, answer in zip(data["opd_reverse_kl"], ANSWERS, strict=True):
        assert len(sample) == len(answer)
    data["rollout_log_probs"] = [torch.zeros(len(answer)) for answer in ANSWERS]
    data["opd_reverse_kl"] = [torch.tensor(row) for row in data["opd_reverse_kl"]]
    data["total_lengths"] = [len(tokens) for tokens in data["tokens"]]
    loss.compute_advantages_and_returns(settings(), data)
    with Client(URL) as client:
        scored = client.score_ids(PROMPT, ANSWERS, options=ScoreOptions(include=["reward"])).results
    returns = np.zeros((2, 4))
    for row, one in enumerate(scored):
        assert one.reward is not None
        returns[row, : len(one.reward)] = np.cumsum(one.reward[::-1])[::-1]
    for row, found in enumerate(data["advantages"]):
        expected = (returns[row] - returns[1 - row])[: len(ANSWERS[row])]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"use_opd": False}, "--use-opd"),
        ({"opd_type": "megatron"}, "--opd-type sglang"),
        ({"opd_kl_coef": 0.5}, "--opd-kl-coef 1"),
        ({"advantage_estimator": "ppo"}, "--advantage-estimator grpo"),
        ({"kl_coef": 0.1}, "--kl-coef"),
        ({"dense_reward": {"service_url": URL}}, "rollout_log_probs"),
    ],
)
def test_settings_under_which_the_advantages_would_be_wrong_are_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        FETCH(settings(**changed), samples())


def test_a_service_that_is_not_there_stops_the_run() -> None:
    nowhere = {"service_url": "http://127.0.0.1:9", "service_patience_s": 0.1, "kl_coefficient": 0.0}
    with pytest.raises(JobError, match="cannot be used"):
        FETCH(settings(dense_reward=nowhere), samples())
