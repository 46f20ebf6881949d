"""The contestant that all others are compared with: the real `dense-reward serve`, asked by its own client."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dense_reward import Client, ScoreOptions
from dense_reward.client.results import Scored
from dense_reward_trainer.runs.local_service import HOST, free_port

from bench.speed.processes import ContestantError, Group
from bench.speed.protocol import Logprobs
from bench.speed.workloads import Item, Workload

LONG_S = 3600.0
BETWEEN_S = 0.2
LOGPROBS = ScoreOptions(include=("sft_logprob", "reference_logprob"))


@dataclass(frozen=True, slots=True, eq=False)
class ServiceRun:
    """`compute_s`: what the service itself says that the models took, over all requests."""

    latencies_s: list[float]
    compute_s: float
    rewards_N: Logprobs


class Service(Group):
    """Ready to score once constructed, and running: `awake` is for whoever measures. Raises ContestantError."""

    def __init__(self, models: Path, *, dtype: str, device: str, threads: int, log: Path) -> None:
        self._port = free_port()
        pair = ("--sft", str(models / "sft"), "--reference", str(models / "reference"))
        knobs = ("--dtype", dtype, "--device", device, "--threads", str(threads), "--port", str(self._port))
        command = [sys.executable, "-m", "dense_reward.cli", "serve", *pair, *knobs, "--log-level", "warning"]
        super().__init__(command, log=log, environment={"TQDM_DISABLE": "1"})
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise

    def client(self) -> Client:
        """One that never tries again: a failure must be seen."""
        return Client(f"http://{HOST}:{self._port}", timeout_s=LONG_S, retry_for_s=0)

    def run(self, workload: Workload) -> ServiceRun:
        """As a job calls it, with the service's defaults: what is answered is the reward."""
        latencies_s, answers = [], []
        with self.client() as client:
            for items in workload.requests:
                started_s = time.perf_counter()
                answers.append(_score(client, items, ScoreOptions()))
                latencies_s.append(time.perf_counter() - started_s)
        compute_s = sum(answer.timing.compute_s for answer in answers)
        return ServiceRun(latencies_s, compute_s, _concatenated(answers, "reward"))

    def logprobs(self, workload: Workload) -> Logprobs:
        """[2, N], sft before reference."""
        with self.client() as client:
            answers = [_score(client, items, LOGPROBS) for items in workload.requests]
        return np.stack([_concatenated(answers, name) for name in ("sft_logprob", "reference_logprob")])

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + LONG_S
        with self.client() as client:
            while not client.ready():
                if self.process.poll() is not None or time.monotonic() > deadline_s:
                    raise ContestantError(f"the service cannot score: {self.last_words()}")
                time.sleep(BETWEEN_S)


def _score(client: Client, items: Sequence[Item], options: ScoreOptions) -> Scored:
    if len(items) == 1:
        return client.score_ids(items[0].prompt_ids, items[0].response_ids, options=options)
    return client.score_items(
        [{"prompt_ids": item.prompt_ids, "response_ids": item.response_ids} for item in items], options=options
    )


def _concatenated(answers: Sequence[Scored], name: str) -> Logprobs:
    return np.concatenate([getattr(result, name) for answer in answers for result in answer.results])
