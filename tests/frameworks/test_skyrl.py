"""SkyRL's own generator, validation, batches and advantages, with token rewards from a running service.

On Python 3.11, SkyRL 0.3.0 cannot be imported with the pydantic that it installs, which refuses typing's TypedDict;
here it gets that of typing_extensions.
"""

import asyncio
import sys
import typing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typing_extensions
from program_source import SFT, URL, source

pytest.importorskip("ray", reason="needs ray: make test-frameworks")
sys.path.insert(0, str(source("skyrl") / "skyrl-gym"))
if sys.version_info < (3, 12):
    setattr(typing, "TypedDict", typing_extensions.TypedDict)  # noqa: B010 - a stand-in, see above

import skyrl_gym
from dense_reward import Client, ScoreOptions
from dense_reward_trainer.configs.dense_reward import DenseRewardOptions
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.integrations import skyrl as adapter
from skyrl.backends.skyrl_train.training_batch import pad_training_input_batch
from skyrl.train.config import GeneratorConfig, SkyRLGymConfig
from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors
from skyrl.train.generators.base import BatchMetadata, TrajectoryID
from skyrl.train.trainer import RayPPOTrainer, TrainingInputBatch
from skyrl.train.utils.trainer_utils import validate_generator_output
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from transformers import AutoTokenizer

TOKENIZER = AutoTokenizer.from_pretrained(SFT)
MESSAGES = [{"role": "user", "content": "Add 12 and 34."}]
ANSWERS = [[40, 41, 42, 43], [40, 44], [45, 46, 47], [48, 49, 50, 51, 52]]
UIDS = ["a", "a", "b", "b"]


class OneTurn(BaseTextEnv):  # type: ignore[misc]
    """One answer; the environment's reward is 7."""

    def __init__(self, **_: object) -> None:
        super().__init__()

    def step(self, action: str) -> BaseTextEnvStepOutput:
        del action
        return BaseTextEnvStepOutput(observations=[], reward=7.0, done=True, metadata={})


skyrl_gym.register(id="one_turn", entry_point=OneTurn)


class Engine:
    """In the place of SkyRL's inference engines: the answers in order."""

    def __init__(self) -> None:
        self.answers = iter(ANSWERS)

    async def generate(self, *_: object, **__: object) -> dict[str, object]:
        ids = [*next(self.answers), TOKENIZER.eos_token_id]
        text = [TOKENIZER.decode(ids)]
        return {"responses": text, "response_ids": [ids], "stop_reasons": ["stop"], "response_logprobs": None}

    async def finish_session(self, _: str) -> None:
        return None


def generator(options: DenseRewardOptions | None = None, **settings: object) -> adapter.DenseRewardGenerator:
    config = GeneratorConfig(max_turns=1, batched=False, n_samples_per_prompt=2, max_input_length=64, **settings)
    config.sampling_params.logprobs = None
    gym = SkyRLGymConfig(max_env_workers=0)
    return adapter.DenseRewardGenerator(
        options or DenseRewardOptions(service_url=URL), config, gym, Engine(), TOKENIZER
    )


def generated(phase: str = "train", options: DenseRewardOptions | None = None) -> dict[str, Any]:
    given = {
        "prompts": [MESSAGES] * 4,
        "env_classes": ["one_turn"] * 4,
        "env_extras": [{} for _ in ANSWERS],
        "sampling_params": None,
        "trajectory_ids": [TrajectoryID(uid, index % 2) for index, uid in enumerate(UIDS)],
        "batch_metadata": BatchMetadata(1, phase),
    }
    output: dict[str, Any] = asyncio.run(generator(options).generate(given, disable_tqdm=True))
    return output


def trainer() -> RayPPOTrainer:
    found = object.__new__(RayPPOTrainer)
    algorithm = SimpleNamespace(advantage_estimator="dense_reward", gamma=1.0, lambd=1.0, grpo_norm_by_std=False)
    settings = SimpleNamespace(step_wise_trajectories=False, merge_stepwise_output=False, n_samples_per_prompt=2)
    found.cfg = SimpleNamespace(generator=settings, trainer=SimpleNamespace(algorithm=algorithm))
    found.all_metrics = {}
    return found


def test_skyrl_trains_on_the_reward_of_every_token() -> None:
    output = generated()
    validate_generator_output(4, output)
    output, uids = trainer().postprocess_generator_output(output, UIDS)
    assert uids == UIDS
    with Client(URL) as client:
        options = ScoreOptions(include=["reward"])
        scored = client.score_ids(output["prompt_token_ids"][0], output["response_ids"], options=options)
    assert sorted(map(len, output["rewards"])) == [3, 4, 5, 6]
    for found, expected in zip(output["rewards"], scored.results, strict=True):
        assert expected.reward is not None
        np.testing.assert_allclose(found, expected.reward, rtol=0, atol=1e-4)


def test_evaluation_keeps_the_rewards_of_the_environment() -> None:
    rewards = [np.sum(reward) for reward in generated("eval")["rewards"]]
    assert rewards == [7.0] * 4


def test_tokens_of_the_environment_get_no_reward() -> None:
    signal_T = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    assert adapter._own(signal_T, [1, 0, 1]).tolist() == [1.0, 0.0, 3.0]
    assert adapter._own(signal_T, [0, 0, 0]).tolist() == [1.0, 2.0, 3.0]


def test_skyrls_advantages_are_those_of_the_job() -> None:
    rewards = [[1.0, 2.0, 4.0], [3.0], [0.5, 0.5], [1.0, 1.0, 1.0]]
    prompts, responses = [[1], [1, 2, 3], [1], [1]], [[9] * len(row) for row in rewards]
    masks = [[1] * len(row) for row in rewards]
    tensors = convert_prompts_responses_to_batch_tensors(TOKENIZER, prompts, responses, rewards, masks)
    batch = TrainingInputBatch(
        {"response_mask": tensors[2], "rewards": tensors[3], "loss_mask": tensors[4], "values": None}
    )
    batch.metadata = {"uids": UIDS, "avg_response_length": 2.25}
    padded = pad_training_input_batch(batch, 2)
    found = trainer().compute_advantages_and_returns(padded)
    expected = [[4.0, 6.0, 4.0], [-4.0], [-2.0, -1.5], [2.0, 1.5, 1.0]]
    for row, values in enumerate(expected):
        at_the_end = torch.zeros(3)
        at_the_end[3 - len(values) :] = torch.tensor(values)
        torch.testing.assert_close(found["advantages"][row], at_the_end)
    assert found["advantages"][4:].abs().max() == 0
    with pytest.raises(ConfigError, match="n_samples_per_prompt above 1"):
        adapter.token_advantages(tensors[3], tensors[2], ["a", "b", "c", "d"])


def test_a_service_that_is_not_there_stops_the_generator() -> None:
    nowhere = DenseRewardOptions(service_url="http://127.0.0.1:9", service_patience_s=0.1)
    with pytest.raises(JobError, match="cannot be used"):
        generated(options=nowhere)


def test_trajectories_of_several_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="step_wise_trajectories"):
        generator(step_wise_trajectories=True)
