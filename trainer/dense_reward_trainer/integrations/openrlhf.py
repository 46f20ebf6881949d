"""Rewards of a service in OpenRLHF 0.11, whose rewards are one number for each response.

Two ways. `DenseRewardExecutor` scores the ids that were sampled, and an error of the service stops the run
(`--train.agent_func_path`, examples/openrlhf_agent.py). `TextRewards` is for a reward-function file
(`--reward.remote_url`, examples/openrlhf_reward.py): it gets only text, as the service's own `POST /get_reward`, and
OpenRLHF logs its errors and goes on until it finds that a reward is missing.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dense_reward.engines.tokenizer import load_tokenizer
from dense_reward.errors import RequestError
from dense_reward.records import FloatArray
from dense_reward.text.continuation import split_ids
from openrlhf.utils.agent import SingleTurnAgentExecutor

from dense_reward_trainer.configs.dense_reward import DenseRewardOptions
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.integrations.aggregated import Aggregate, aggregated
from dense_reward_trainer.integrations.connection import rewards_of
from dense_reward_trainer.rl.records import Rollout


class DenseRewardExecutor(SingleTurnAgentExecutor):  # type: ignore[misc]
    """One answer to each prompt, and the aggregate of its token rewards. A subclass sets the options.

    Of `dense_reward`, only signal and service are read.
    """

    dense_reward = DenseRewardOptions()
    aggregate: Aggregate = "sum"

    def __init__(self) -> None:
        super().__init__(None)

    async def execute(self, *, hf_tokenizer: Any, **sampled: Any) -> dict[str, Any]:  # noqa: ANN401 - OpenRLHF's types
        """OpenRLHF's output, with the reward. Raises JobError if the service cannot be used."""
        if sampled.get("images"):
            raise JobError("the reward service takes no images: leave them out")
        output: dict[str, Any] = await super().execute(hf_tokenizer=hf_tokenizer, **sampled)
        [(start, end)] = output["action_ranges"]
        ids = np.array(output["observation_tokens"], dtype=np.int32)
        rollout = Rollout(ids[:start], ids[start:end], not output["truncated"])
        signal_T = await asyncio.to_thread(self._signal, hf_tokenizer, rollout)
        reward = aggregated(signal_T, self.aggregate)
        return output | {"reward": reward, "scores": reward, "extra_logs": {"dense_reward_sum": float(signal_T.sum())}}

    def _signal(self, tokenizer: Any, rollout: Rollout) -> FloatArray:  # noqa: ANN401 - of transformers
        options = self.dense_reward
        rewards = rewards_of(options.service_url, options, tokenizer, signal=options.signal)
        return rewards.score([rollout])[0].signal_T


class TextRewards:
    """`reward_func` of a file for `--reward.remote_url`. `tokenizer`: folder of the policy's checkpoint.

    The ids are those that the tokenizer gives the text; a text whose ids are not known is an error.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        dense_reward: DenseRewardOptions | None = None,
        *,
        aggregate: Aggregate = "sum",
        max_tokens: int = 131_072,
    ) -> None:
        self._tokenizer = load_tokenizer(Path(tokenizer))
        self._options = dense_reward or DenseRewardOptions()
        self._aggregate = aggregate
        self._max_tokens = max_tokens

    def __call__(self, queries: Sequence[str], prompts: Sequence[str]) -> Mapping[str, list[float]]:
        """Rewards in the form that OpenRLHF expects. Raises JobError."""
        rollouts = [self._rollout(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
        options = self._options
        tokenizer = self._tokenizer.transformers_tokenizer
        scored = rewards_of(options.service_url, options, tokenizer, signal=options.signal).score(rollouts)
        rewards = [aggregated(one.signal_T, self._aggregate) for one in scored]
        return {"rewards": rewards, "scores": rewards}

    def _rollout(self, query: str, prompt: str) -> Rollout:
        try:
            return Rollout(*split_ids(self._tokenizer, query, prompt, self._max_tokens), False)
        except RequestError as error:
            raise JobError(f"{error}, or use DenseRewardExecutor, which sends ids") from None
