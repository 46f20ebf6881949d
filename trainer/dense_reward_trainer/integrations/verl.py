"""DPR inside verl 0.9 (V1 trainer): an agent loop whose output has a reward for every token, and an estimator for them.

Set `VERL_USE_EXTERNAL_MODULES=dense_reward_trainer.integrations.verl`, so that every process of verl imports this
module, and name the agent loop and the estimator in verl's configuration (examples/verl_dense.sh). An error of the
service fails the group of its prompt, which verl then drops; nothing is replaced by 0.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dense_reward import AsyncClient, ScoreOptions
from dense_reward.client.tokenizer import card_named
from dense_reward.schemas import SignalName
from numpy.typing import NDArray
from torch import Tensor
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.core_algos import register_adv_est

from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.returns import minus_other_answers, reward_to_go

AGENT_LOOP = ESTIMATOR = "dense_reward"


class TokenRewardOutput(AgentLoopOutput):  # type: ignore[misc]
    """An output whose `rm_scores` are a reward for every token; verl's own puts one number at the last token."""

    token_rewards: list[float]

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = super().as_dict()
        rewards = torch.tensor(found.pop("token_rewards"), dtype=torch.float32)
        if rewards.shape != found["responses"].shape:
            raise ValueError(f"{len(rewards)} rewards for {len(found['responses'])} tokens")
        return found | {"rm_scores": rewards}


@dataclass(frozen=True, slots=True)
class _Pinned:
    """A client that has pinned the tokenizer and revision of a pair, and the options that name the pair."""

    client: AsyncClient
    options: ScoreOptions


_PINNED: dict[tuple[object, ...], "asyncio.Task[_Pinned]"] = {}
"""By event loop, address, pair and signal: verl makes a new agent loop for every sample."""


@register(AGENT_LOOP)
class DenseRewardAgentLoop(SingleTurnAgentLoop):  # type: ignore[misc]
    """One answer to each prompt, by verl's server; then the reward of each of its tokens, by ids, from the service."""

    def __init__(
        self,
        *args: object,
        service_url: str = "http://127.0.0.1:8000",
        service_pair: str | None = None,
        signal: SignalName = "reward",
        patience_s: float = 300.0,
        **others: object,
    ) -> None:
        super().__init__(*args, **others)
        if not self.config.trainer.get("use_v1", True):
            raise ConfigError("verl's older trainer sums token rewards into the last token: set trainer.use_v1 to true")
        self._address = service_url, service_pair, signal, patience_s

    async def run(self, sampling_params: dict[str, Any], **sample: Any) -> TokenRewardOutput:  # noqa: ANN401 - verl's
        """Raises ClientError if the service does not score, also because its models are others than at first."""
        output = await super().run(sampling_params, **sample)
        pinned = await self._pinned()
        scored = await pinned.client.score_ids(output.prompt_ids, [output.response_ids], options=pinned.options)
        rewards = getattr(scored.results[0], self._address[2])
        values = output.model_dump(exclude_unset=True) | {
            "token_rewards": [float(reward) for reward in rewards],
            "reward_score": float(rewards.sum()),
        }
        return TokenRewardOutput(**values)

    async def _pinned(self) -> _Pinned:
        key = (asyncio.get_running_loop(), *self._address)
        if key not in _PINNED:
            _PINNED[key] = asyncio.ensure_future(_pin(*self._address, self.tokenizer))
        try:
            return await asyncio.shield(_PINNED[key])
        except Exception:
            _PINNED.pop(key, None)  # the next sample tries again
            raise


async def _pin(url: str, pair: str | None, signal: SignalName, patience_s: float, tokenizer: Any) -> _Pinned:  # noqa: ANN401
    client = AsyncClient(url, retry_for_s=patience_s)
    await client.wait_until_ready(patience_s)
    await client.check_tokenizer(tokenizer, pair)  # pins tokenizer and revision
    card = card_named(await client.models(), pair)
    return _Pinned(client, ScoreOptions(model=card.name, include=[signal]))


@register_adv_est(ESTIMATOR)  # type: ignore[untyped-decorator]
def token_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: NDArray[np.object_],
    config: Mapping[str, Any] | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Reward-to-go minus its mean over the other answers to the prompt, position by position; and the reward-to-go.

    As in the job dpr with `baseline: leave_one_out`; all [B, T]. `index`: the prompt of each row. With verl's
    `use_kl_in_reward`, the rewards already have the KL penalty. Raises ConfigError if a prompt has one answer.
    """
    gamma = 1.0 if config is None else float(config.get("gamma", 1.0))
    prompts = index.tolist()
    if 1 in Counter(prompts).values():
        raise ConfigError("a prompt has one answer, so there is nothing to compare it with: set rollout.n above 1")
    with torch.no_grad():
        return_BT = reward_to_go(token_level_rewards, response_mask, gamma)
        advantage_BT = minus_other_answers(return_BT, prompts) * response_mask
    return advantage_BT.float(), return_BT.float()
