"""How a worker is talked to: JSON lines on its stdin and stdout. Imports numpy alone: vLLM's worker reads it too.

A worker loads once and says so with a line of facts; then it answers each Question with an Answer.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from bench.speed.workloads import Item, read

Logprobs = NDArray[np.float32]  # [models, N]: of all responses' tokens, in order
Score = Callable[[tuple[Item, ...]], Logprobs]
Facts = Mapping[str, object]


class Question(TypedDict):
    """`method` and `batch` mean something to some workers; log-probs are written to `out`, a .npy."""

    workload: str
    out: str
    method: str
    batch: int


class Answer(TypedDict, total=False):
    """Seconds of each request of the workload; or why there are none; or other facts."""

    latencies_s: list[float]
    error: str
    facts: dict[str, object]


def serve(start: Callable[[], tuple[Facts, Callable[[Question], Answer]]]) -> None:
    """Load, then answer until stdin ends. What libraries print goes to stderr: stdout is for answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    facts, answer = start()
    answers.write(json.dumps({"facts": facts}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")


def timed(question: Question, score: Score) -> Answer:
    """Score the workload's requests one after the other."""
    latencies_s, logprobs = time_requests(read(Path(question["workload"])).requests, score)
    np.save(question["out"], np.concatenate(logprobs, axis=1))
    return {"latencies_s": latencies_s}


def time_requests(requests: Sequence[tuple[Item, ...]], score: Score) -> tuple[list[float], list[Logprobs]]:
    latencies_s, logprobs = [], []
    for items in requests:
        started_s = time.perf_counter()
        logprobs.append(score(items))
        latencies_s.append(time.perf_counter() - started_s)
    return latencies_s, logprobs
