"""OpenRLHF's own single-turn executor, its request and its way to load a reward file, with a running service.

Its package needs DeepSpeed and flash-attn; the module with the executor does not.
"""

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from program_source import SFT, URL, source, without_init

pytest.importorskip("aiohttp", reason="needs aiohttp: make test-frameworks")
without_init(source("openrlhf"), "openrlhf", "openrlhf.utils")

from dense_reward import Client, ScoreOptions  # noqa: E402 - after the skips
from dense_reward_trainer.configs.dense_reward import DenseRewardOptions  # noqa: E402
from dense_reward_trainer.errors import JobError  # noqa: E402
from dense_reward_trainer.integrations.openrlhf import DenseRewardExecutor, TextRewards  # noqa: E402
from openrlhf.utils.agent import SingleTurnAgentExecutor  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = AutoTokenizer.from_pretrained(SFT)
MESSAGES = [{"role": "user", "content": "Add 12 and 34."}]
PROMPT = TOKENIZER.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
PROMPT_IDS = TOKENIZER(PROMPT, add_special_tokens=False)["input_ids"]
RESPONSE = [*TOKENIZER("12 + 34 = 46", add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]


class Engine:
    """In the place of vLLM: always the same answer."""

    def __init__(self, response: list[int], finish_reason: str = "stop") -> None:
        self.response, self.finish_reason = response, finish_reason

    async def generate(self, *_: object, **__: object) -> object:
        text = TOKENIZER.decode(self.response)
        output = SimpleNamespace(token_ids=self.response, text=text, finish_reason=self.finish_reason, logprobs=None)
        return SimpleNamespace(outputs=[output])


def executed(
    executor: SingleTurnAgentExecutor, engine: Engine | None = None, prompt: str = PROMPT, images: object = None
) -> dict[str, Any]:
    output: dict[str, Any] = asyncio.run(
        executor.execute(
            prompt=prompt,
            label="46",
            sampling_params=SimpleNamespace(max_tokens=32, logprobs=None),
            max_length=128,
            hf_tokenizer=TOKENIZER,
            llm_engine=engine or Engine(RESPONSE),
            images=images,
        )
    )
    return output


def expected(aggregate: str, response: list[int] = RESPONSE) -> float:
    with Client(URL) as client:
        scored = client.score_ids(PROMPT_IDS, [response], options=ScoreOptions(include=["reward"])).results[0]
    value = getattr(scored, aggregate)
    assert value is not None
    return float(value)


@pytest.mark.parametrize("aggregate", ["sum", "mean", "min"])
def test_its_request_gets_the_reward_of_the_ids_that_were_sampled(aggregate: str) -> None:
    output = executed(SingleTurnAgentExecutor([f"{URL}/get_reward?aggregate={aggregate}"]))
    assert output["reward"] == output["scores"] == [pytest.approx(expected(aggregate), abs=1e-4)]
    assert output["extra_logs"]["dense_reward_length"] == [len(RESPONSE)]


def test_a_response_that_was_cut_off_is_scored_without_an_end() -> None:
    output = executed(SingleTurnAgentExecutor([f"{URL}/get_reward"]), Engine(RESPONSE[:-1], "length"))
    assert output["reward"] == [pytest.approx(expected("sum", RESPONSE[:-1]), abs=1e-4)]


def test_a_prompt_that_it_cut_is_refused_and_has_no_reward(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def at_once(_: float) -> None:
        return None

    monkeypatch.setattr(asyncio, "sleep", at_once)  # it waits a second between its five attempts
    monkeypatch.setattr(logging.getLogger("openrlhf"), "propagate", True)
    with caplog.at_level(logging.INFO):
        output = executed(SingleTurnAgentExecutor([f"{URL}/get_reward"]), prompt=PROMPT * 5)
    assert output["reward"] is None
    assert caplog.text.count("422") == 5


@pytest.mark.parametrize(("file", "loaded"), [("openrlhf_reward.py", "reward_func")])
def test_the_example_of_a_reward_file_gives_the_same_reward(file: str, loaded: str) -> None:
    executor = SingleTurnAgentExecutor([str(EXAMPLES / file)])
    assert getattr(executor, loaded) is not None
    assert executed(executor)["reward"] == [pytest.approx(expected("sum"), abs=1e-4)]


def test_a_reward_file_refuses_a_text_whose_ids_are_not_known() -> None:
    rewards = TextRewards(SFT, DenseRewardOptions(service_url=URL))
    with pytest.raises(JobError, match=r"U\+FFFD.*DenseRewardExecutor"):
        rewards([PROMPT + "\ufffd"], [PROMPT])


def test_the_executor_by_ids_gives_a_reward_where_the_text_has_none() -> None:
    class Executor(DenseRewardExecutor):
        dense_reward = DenseRewardOptions(service_url=URL)
        aggregate = "min"

    split = [*RESPONSE[:-1], 255, 254]  # ids whose text is no character, or is split otherwise by the tokenizer
    output = executed(Executor(), Engine(split, "length"))
    assert output["reward"] == pytest.approx(expected("min", split), abs=1e-4)
    np.testing.assert_array_equal(output["observation_tokens"], PROMPT_IDS + split)
    with pytest.raises(JobError, match="no images"):
        executed(Executor(), images=["a.png"])


def test_a_service_that_is_not_there_stops_the_executor_by_ids() -> None:
    class Executor(DenseRewardExecutor):
        dense_reward = DenseRewardOptions(service_url="http://127.0.0.1:9", service_patience_s=0.1)

    with pytest.raises(JobError, match="cannot be used"):
        executed(Executor())
