"""AReaL's own workflow and rollout thread, with a running service; and what its reward wrapper does with a slow one."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from program_source import SFT, URL, source

pytest.importorskip("uvloop", reason="needs uvloop: make test-frameworks")
source("areal")

from areal.api import AsyncRewardWrapper  # noqa: E402 - after the skips
from areal.api.cli_args import GenerationHyperparameters  # noqa: E402
from areal.infra.async_task_runner import AsyncTaskRunner  # noqa: E402
from dense_reward import Client, ScoreOptions  # noqa: E402
from dense_reward_trainer.integrations.areal import DenseRewardWorkflow, RunStopped  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

MESSAGES = [{"role": "user", "content": "Add 12 and 34."}]
RESPONSE = [40, 41, 42, 43]


class Engine:
    """In the place of AReaL's inference engine: always the same answer."""

    async def agenerate(self, request: Any) -> object:  # noqa: ANN401 - AReaL's type
        return SimpleNamespace(
            input_tokens=request.input_ids,
            output_tokens=RESPONSE,
            input_len=len(request.input_ids),
            output_len=len(RESPONSE),
            output_logprobs=[-1.0] * len(RESPONSE),
            output_versions=[0] * len(RESPONSE),
        )


def workflow(url: str = URL, **options: Any) -> DenseRewardWorkflow:  # noqa: ANN401
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    service = {"service_url": url, "service_patience_s": 0.1 if url != URL else 60.0}
    return DenseRewardWorkflow(
        gconfig=GenerationHyperparameters(max_new_tokens=8), tokenizer=tokenizer, dense_reward=service, **options
    )


@pytest.mark.parametrize("aggregate", ["sum", "mean", "min"])
def test_the_episode_has_the_reward_of_the_ids_that_were_sampled(aggregate: str) -> None:
    episode = asyncio.run(workflow(aggregate=aggregate).arun_episode(Engine(), {"messages": MESSAGES}))
    prompt = episode["input_ids"][0, : -len(RESPONSE)].tolist()
    with Client(URL) as client:
        scored = client.score_ids(prompt, [RESPONSE], options=ScoreOptions(include=["reward"])).results[0]
    assert episode["rewards"].tolist() == [pytest.approx(getattr(scored, aggregate), abs=1e-4)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # AReaL's thread ends with it
def test_a_service_that_is_not_there_ends_the_rollout_thread_and_the_run() -> None:
    stopped = workflow("http://127.0.0.1:9")
    with pytest.raises(RunStopped, match="cannot be used"):
        asyncio.run(stopped.arun_episode(Engine(), {"messages": MESSAGES}))
    runner: Any = AsyncTaskRunner(max_queue_size=4)
    runner.initialize()
    try:
        runner.submit(lambda: stopped.arun_episode(Engine(), {"messages": MESSAGES}), task_id=1)
        with pytest.raises(RuntimeError, match=r"exiting|died"):
            runner.wait(count=1, timeout=30)
    finally:
        runner.destroy()


def slow(*_: object, **__: object) -> float:
    time.sleep(1.0)
    return 3.0


def test_areals_own_wrapper_makes_a_slow_reward_0() -> None:
    """Why the workflow does not use it."""
    wrapper = AsyncRewardWrapper(slow, timeout_seconds=0.1, max_workers=1, max_retries=0)
    assert asyncio.run(wrapper("", "", [1], [2])) == 0
