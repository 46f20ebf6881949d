"""slime's own conversion of samples, its way to the training processes and its loss hook, with a running service.

Megatron and SGLang are stand-ins: slime's code that calls them does not run here.
"""

import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from program_source import SFT, URL, source, stand_ins

pytest.importorskip("ray", reason="needs ray: make test-frameworks")
source("slime")
stand_ins("megatron", "sglang", "sglang_router")

from dense_reward import Client, ScoreOptions  # noqa: E402 - after the skips
from dense_reward_trainer.errors import ConfigError, JobError  # noqa: E402
from slime.backends.megatron_utils import cp_utils, loss  # noqa: E402
from slime.observability.rollout_data_utils import tensorize_rollout_data_for_training  # noqa: E402
from slime.ray.rollout import RolloutManager  # noqa: E402
from slime.utils.misc import load_function  # noqa: E402
from slime.utils.types import Sample  # noqa: E402

ADAPTER = "dense_reward_trainer.integrations.slime"
PROMPTS = [[1, 5, 6], [1, 7]]
ANSWERS = [[40, 41, 42, 43], [40, 44], [45, 46, 47], [48, 49, 50, 51, 52]]
LOGPROBS = [[-1.0] * len(answer) for answer in ANSWERS]
KL = 0.25


def settings(**changed: object) -> Namespace:
    given: dict[str, object] = {
        "custom_advantage_function_path": f"{ADAPTER}.advantages",
        "hf_checkpoint": SFT,
        "rollout_temperature": 1.0,
        "use_opd": False,
        "kl_coef": 0.0,
        "reward_key": None,
        "use_rollout_logprobs": False,
        "normalize_advantages": False,
        "dense_reward": {"service_url": URL, "kl_coefficient": KL},
    }
    return Namespace(**given | changed)


def samples(**changed: object) -> list[Sample]:
    """Two answers to each of two prompts, in an order that mixes the groups."""
    made = [
        Sample(
            group_index=index // 2,
            index=index,
            tokens=PROMPTS[index // 2] + answer,
            response_length=len(answer),
            reward=float(index),
            rollout_log_probs=LOGPROBS[index],
            status=Sample.Status.COMPLETED,
            **changed,
        )
        for index, answer in enumerate(ANSWERS)
    ]
    return [made[index] for index in (2, 0, 3, 1)]


def expected() -> list[np.ndarray[Any, Any]]:
    """The reward-to-go with the KL penalty minus that of the other answer, in the order of ANSWERS."""
    found: list[np.ndarray[Any, Any]] = []
    for group, prompt in enumerate(PROMPTS):
        answers = ANSWERS[2 * group : 2 * group + 2]
        with Client(URL) as client:
            options = ScoreOptions(include=["reward", "sft_logprob"])
            scored = client.score_ids(prompt, answers, options=options).results
        returns = np.zeros((2, 8))
        for row, one in enumerate(scored):
            assert one.reward is not None
            assert one.sft_logprob is not None
            shaped = one.reward - KL * (-1.0 - one.sft_logprob)
            returns[row, : len(shaped)] = np.cumsum(shaped[::-1])[::-1]
        found += [(returns[row] - returns[1 - row])[: len(answer)] for row, answer in enumerate(answers)]
    return found


def manager(args: Namespace) -> Any:  # noqa: ANN401 - slime's class
    """slime's RolloutManager without its engines."""
    found = object.__new__(RolloutManager.__ray_metadata__.modified_class)
    found.args = args
    found.custom_convert_samples_to_train_data_func = None
    found.custom_reward_post_process_func = load_function(f"{ADAPTER}.fetch")
    return found


def trained_on(args: Namespace, given: list[Sample], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What slime's loss gets of these samples."""
    parallel = SimpleNamespace(is_pipeline_last_stage=lambda: True, get_context_parallel_world_size=lambda: 1)
    monkeypatch.setattr(loss, "mpu", parallel)
    monkeypatch.setattr(cp_utils, "mpu", parallel)
    data: dict[str, Any] = manager(args)._convert_samples_to_train_data(given)
    data["total_lengths"] = [len(tokens) for tokens in data["tokens"]]
    tensorize_rollout_data_for_training(data)
    lengths = zip(data.get("teacher_log_probs", []), data["total_lengths"], data["response_lengths"], strict=False)
    if "teacher_log_probs" in data:
        data["teacher_log_probs"] = [cp_utils.slice_log_prob_with_cp(*one) for one in lengths]
    data["log_probs"] = data["rollout_log_probs"]
    loss.compute_advantages_and_returns(args, data)
    return data


def test_slime_trains_on_the_advantages_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    data = trained_on(settings(), samples(), monkeypatch)
    assert data["raw_reward"] == [2.0, 0.0, 3.0, 1.0]
    for found, index in zip(data["advantages"], (2, 0, 3, 1), strict=True):
        np.testing.assert_allclose(found.numpy(), expected()[index], rtol=0, atol=1e-4)


def test_slime_sends_the_carried_field_to_its_training_processes() -> None:
    sent: list[dict[str, Any]] = []
    module = sys.modules[RolloutManager.__ray_metadata__.modified_class.__module__]
    schedule = MagicMock(return_value=([[0, 1, 2, 3]], [[[0, 1, 2, 3]]], [1], [4]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_dp_schedule", schedule)
        patch.setattr(module, "ray", SimpleNamespace(put=sent.append))
        one = manager(settings(global_batch_size=4, rollout_data_transport="object-store"))
        one.train_parallel_config = {"dp_size": 1}
        one._split_train_data_by_dp(one._convert_samples_to_train_data(samples()))
    assert [len(row) for row in sent[0]["teacher_log_probs"]] == [3, 4, 5, 2]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"custom_advantage_function_path": None}, "--custom-advantage-function-path"),
        ({"use_opd": True}, "--use-opd"),
        ({"kl_coef": 0.1}, "--kl-coef has no effect"),
        ({"rollout_temperature": 0.7}, "rollout-temperature to 1"),
        ({"dense_reward": {"returns": "later"}}, r"dense_reward\.returns.*--custom-config-path"),
        ({"dense_reward": {"candidates": 4}}, "set candidates to 0"),
    ],
)
def test_settings_under_which_the_advantages_would_be_wrong_are_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_function(f"{ADAPTER}.fetch")(settings(**changed), samples())


def test_samples_whose_advantages_would_be_wrong_are_refused() -> None:
    fetch, args = load_function(f"{ADAPTER}.fetch"), settings()
    masked, alone, mixed, several = samples(), samples(), samples(), samples()
    masked[0].loss_mask = [0, 1, 1]
    mixed[0].group_index = 0
    for sample in several:
        sample.rollout_id = 3
    for given, reason in (
        (masked, "loss_mask has zeros"),
        (alone[:2], "one answer"),
        (alone[:3], "different sizes"),
        (several, "several samples"),
    ):
        with pytest.raises(ConfigError, match=reason):
            fetch(args, given)
    mixed[1].group_index = 1
    with pytest.raises(ConfigError, match="several prompts"):
        fetch(args, mixed)


def test_advantages_that_were_not_fetched_are_an_error() -> None:
    with pytest.raises(ConfigError, match="--custom-reward-post-process-path"):
        load_function(f"{ADAPTER}.advantages")(settings(), {"kl": []})


def test_a_service_that_is_not_there_stops_the_run() -> None:
    nowhere = {"service_url": "http://127.0.0.1:9", "service_patience_s": 0.1}
    with pytest.raises(JobError, match="cannot be used"):
        load_function(f"{ADAPTER}.fetch")(settings(dense_reward=nowhere), samples())
