"""verl's own agent loop, postprocessing and advantage code, with token rewards from a running service.

Runs in an environment with verl (`make test-frameworks`), beside a service of a chat checkpoint:
DENSE_REWARD_URL and DENSE_REWARD_SFT name them.
"""

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="needs verl: make test-frameworks")
URL = os.environ.get("DENSE_REWARD_URL", "")
if not URL:
    pytest.skip("needs a service: make test-frameworks", allow_module_level=True)

from dense_reward import Client, ClientError, ScoreOptions  # noqa: E402 - after the skips
from dense_reward_trainer.errors import ConfigError  # noqa: E402
from dense_reward_trainer.integrations import verl as adapter  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, _agent_loop_registry  # noqa: E402
from verl.trainer.ppo.ray_trainer import compute_advantage  # noqa: E402
from verl.trainer.ppo.v1 import agent_loop_tq  # noqa: E402
from verl.workers.rollout.replica import TokenOutput  # noqa: E402

RESPONSE = [40, 41, 42, 43]
MESSAGES = [{"role": "user", "content": "Add 12 and 34."}]


class Server:
    """In the place of verl's inference server: always the same answer."""

    async def generate(self, **_: object) -> TokenOutput:
        return TokenOutput(token_ids=RESPONSE, log_probs=[-1.0] * len(RESPONSE))


def config(**trainer: object) -> DictConfig:
    rollout = {"prompt_length": 64, "response_length": 16}
    return OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "trainer": trainer, "data": {}})


def loop(settings: DictConfig | None = None) -> adapter.DenseRewardAgentLoop:
    settings = config() if settings is None else settings
    tokenizer = AutoTokenizer.from_pretrained(os.environ["DENSE_REWARD_SFT"])
    wrapped = DictConfigWrap(settings), Server(), tokenizer, None, None, DictConfigWrap(settings.data)
    return adapter.DenseRewardAgentLoop(*wrapped, service_url=URL)


def test_the_agent_loop_is_registered_by_name() -> None:
    target = _agent_loop_registry["dense_reward"]["_target_"]
    assert target == "dense_reward_trainer.integrations.verl.DenseRewardAgentLoop"


def test_what_verl_stores_has_the_reward_of_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: dict[str, Any] = {}

    async def put(**given: object) -> None:
        stored.update(given)

    async def sample() -> adapter.TokenRewardOutput:
        output = await loop().run({}, raw_prompt=MESSAGES)
        worker = object.__new__(agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class)
        worker.reward_loop_worker_handles, worker.distillation_enabled, worker.processor = None, False, None
        kwargs = {"uid": "a", "session_id": 0, "global_steps": 1}
        await worker._agent_loop_postprocess(output, False, **kwargs)
        return output

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_batch_put", put)
    output = asyncio.run(sample())
    with Client(URL) as client:
        options = ScoreOptions(include=["reward"])
        expected = client.score_ids(output.prompt_ids, [RESPONSE], options=options).results[0]
    fields = stored["fields"]
    assert expected.reward is not None
    np.testing.assert_allclose(fields["rm_scores"][0].numpy(), expected.reward, rtol=0, atol=1e-5)
    assert output.reward_score == pytest.approx(expected.sum, abs=1e-4)
    assert fields["responses"][0].tolist() == RESPONSE


def test_a_service_with_other_models_fails_the_sample_instead_of_rewarding_it() -> None:
    async def sample() -> None:
        agent = loop()
        pinned = await agent._pinned()
        card = (await pinned.client.models())[0]
        pinned.client.pin(card.model_copy(update={"revision": "0" * 64}))
        await agent.run({}, raw_prompt=MESSAGES)

    with pytest.raises(ClientError, match="revision"):
        asyncio.run(sample())


def test_the_older_trainer_is_refused_because_it_sums_token_rewards() -> None:
    with pytest.raises(ConfigError, match=r"set trainer\.use_v1 to true"):
        loop(config(use_v1=False))


def test_rewards_of_another_length_are_refused() -> None:
    output = adapter.TokenRewardOutput(
        prompt_ids=[1], response_ids=[2, 3], response_mask=[1, 1], metrics={}, token_rewards=[0.5]
    )
    with pytest.raises(ValueError, match="1 rewards for 2 tokens"):
        output.as_dict()


def test_the_estimator_is_the_reward_to_go_minus_that_of_the_other_answers() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    data = DataProto(
        batch=TensorDict({"token_level_rewards": rewards, "response_mask": mask}, batch_size=4),
        non_tensor_batch={"uid": np.array(["a", "a", "b", "b"], dtype=object)},
    )
    found = compute_advantage(data, "dense_reward", config=SimpleNamespace(get={"gamma": 1.0}.get)).batch
    returns = torch.tensor([[7.0, 6.0, 4.0], [3.0, 0.0, 0.0], [1.0, 0.5, 0.0], [3.0, 2.0, 1.0]])
    others = returns[[1, 0, 3, 2]]
    torch.testing.assert_close(found["returns"], returns)
    torch.testing.assert_close(found["advantages"], (returns - others) * mask)
    with pytest.raises(ConfigError, match=r"set rollout\.n above 1"):
        adapter.token_advantages(rewards[:1], mask[:1], np.array(["a"], dtype=object))
