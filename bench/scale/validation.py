"""Compares the simulation with a measured experiment, and reads a machine's speed from measurements."""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import numpy as np
from dense_reward.errors import RequestError

from bench.reliability import overload
from bench.reliability.load import Known, requests
from bench.reliability.server import percentile
from bench.scale.replica import EventQueue, Machine, Replica, Request

SMALL, LARGE = "d_40m", "a_40m"
"""Cells of bench/results/cpu.json: one prompt with one response, and four prompts with eight responses each."""
SMALL_TOKENS, LARGE_TOKENS = 256, 4608
SEEDS, DISTINCT_REQUESTS = 20, 600
OVERLOAD = Machine(1.0, max_batch_tokens=4096, max_queue_tokens=16_384)
"""Same limits as `bench.reliability.overload.LIMITS`."""


class Timed(TypedDict):
    latencies_s: list[float]


class Round(TypedDict):
    service: Timed


class Cell(TypedDict):
    """Fields of a cell of bench/results/cpu.json that are read."""

    rounds: list[Round]


class Loop(TypedDict):
    """Outcome of the requests of a loop."""

    statuses: dict[str, int]
    answered_p50_ms: float
    answered_p99_ms: float


class Overload(TypedDict):
    """Fields of the experiment in bench/results/reliability.json that are read."""

    figures: dict[str, float]
    requests_per_s: dict[str, float]
    closed: Loop
    open: Loop


@dataclass(slots=True)
class Calls:
    """Outcome of requests that are each sent once."""

    answered_s: list[float] = field(default_factory=list)
    answered_tokens: int = 0
    refused: int = 0
    last_s: float = 0.0

    @property
    def sent(self) -> int:
        return len(self.answered_s) + self.refused

    def call(
        self, replica: Replica, events: EventQueue, request: Request, then: Callable[[], None] | None = None
    ) -> None:
        """Sends a request. Calls `then` at the answer; a refusal is only counted."""
        began_s = events.now_s

        def answered() -> None:
            self.answered_s.append(events.now_s - began_s)
            self.answered_tokens += sum(request.response_tokens)
            self.last_s = events.now_s
            if then is not None:
                then()

        try:
            replica.submit(request, answered)
        except RequestError:
            self.refused += 1


def open_loop(machine: Machine, incoming: Iterator[Request], per_s: float, seconds: float, seed: int) -> Calls:
    """Sends requests at random times (a Poisson process), without waiting for answers."""
    events, draw, calls = EventQueue(), np.random.default_rng(seed), Calls()
    replica = Replica(machine, events, draw)

    def arrive() -> None:
        if events.now_s < seconds:
            calls.call(replica, events, next(incoming))
            events.after(float(draw.exponential(1 / per_s)), arrive)

    events.after(float(draw.exponential(1 / per_s)), arrive)
    events.run()
    return calls


def closed_loop(machine: Machine, incoming: Iterator[Request], callers: int, seconds: float, seed: int) -> Calls:
    """Each caller sends its next request as soon as the previous one is answered."""
    events, calls = EventQueue(), Calls()
    replica = Replica(machine, events, np.random.default_rng(seed))

    def ask() -> None:
        if events.now_s < seconds:
            calls.call(replica, events, next(incoming), ask)

    for _ in range(callers):
        ask()
    events.run()
    return calls


def measured_machine(cells: Mapping[str, Cell]) -> Machine:
    """Fits a line through a small and a large batch of the 40M model in bench/results/cpu.json."""
    batch_s = {
        name: [statistics.median(one["service"]["latencies_s"]) for one in cells[name]["rounds"]]
        for name in (SMALL, LARGE)
    }
    small_s, large_s = statistics.median(batch_s[SMALL]), statistics.median(batch_s[LARGE])
    token_s = (large_s - small_s) / (LARGE_TOKENS - SMALL_TOKENS)
    jitter = statistics.stdev(map(math.log, batch_s[LARGE]))
    return Machine(1 / token_s, small_s - SMALL_TOKENS * token_s, jitter)


def overload_simulated(capacity_per_s: float, jitter: float) -> dict[str, dict[str, float]]:
    """Simulates the experiment `overload` of bench/reliability: mean and standard deviation over seeds of each figure.

    The machine is as fast as the experiment's closed loop was. No other figure is fitted: all returned ones are
    predictions.
    """
    callers = overload.CLIENTS * overload.CONCURRENCY
    machine = replace(OVERLOAD, jitter=jitter, tokens_per_s=_speed(capacity_per_s, jitter, callers))
    runs = [_overload_once(machine, callers, seed) for seed in range(SEEDS)]
    return {
        name: {"mean": statistics.mean(values), "std": statistics.stdev(values)}
        for name in runs[0]
        if (values := [run[name] for run in runs])
    }


def _overload_once(machine: Machine, callers: int, seed: int) -> dict[str, float]:
    closed = closed_loop(machine, _drawn(2 * seed), callers, overload.CLOSED_S, seed)
    capacity = closed.answered_tokens / closed.last_s
    rate = overload.EXCESS * len(closed.answered_s) / closed.last_s
    opened = open_loop(machine, _drawn(2 * seed + 1), rate, overload.OPEN_S, seed)
    return {
        "goodput_ratio": opened.answered_tokens / opened.last_s / capacity,
        "refusal_share": opened.refused / opened.sent,
        "closed_p50_ms": 1e3 * percentile(closed.answered_s, 0.5),
        "closed_p99_ms": 1e3 * percentile(closed.answered_s, 0.99),
        "open_p50_ms": 1e3 * percentile(opened.answered_s, 0.5),
        "open_p99_ms": 1e3 * percentile(opened.answered_s, 0.99),
    }


def overload_measured(experiment: Overload) -> dict[str, float]:
    """Returns the same figures from bench/results/reliability.json."""
    closed, opened = experiment["closed"], experiment["open"]
    statuses = opened["statuses"]
    return {
        "goodput_ratio": experiment["figures"]["goodput_ratio"],
        "refusal_share": statuses["429"] / sum(statuses.values()),
        "closed_p50_ms": closed["answered_p50_ms"],
        "closed_p99_ms": closed["answered_p99_ms"],
        "open_p50_ms": opened["answered_p50_ms"],
        "open_p99_ms": opened["answered_p99_ms"],
    }


def _speed(capacity_per_s: float, jitter: float, callers: int) -> float:
    """Tokens per second with which the closed loop answers `capacity_per_s` requests: they are proportional."""
    trial = replace(OVERLOAD, jitter=jitter, tokens_per_s=1e4)
    calls = closed_loop(trial, _drawn(0), callers, SEEDS * overload.CLOSED_S, seed=0)
    return trial.tokens_per_s * capacity_per_s * calls.last_s / len(calls.answered_s)


def _drawn(seed: int) -> Iterator[Request]:
    """Draws from the requests that the experiment sends."""
    draw = random.Random(seed)
    population = [_request(number, known) for number, known in enumerate(requests(DISTINCT_REQUESTS))]
    return (draw.choice(population) for _ in itertools.count())


def _request(number: int, known: Known) -> Request:
    prompt, responses = known.body["prompt_ids"], known.body["response_ids"]
    assert isinstance(prompt, Sequence)
    assert isinstance(responses, Sequence)
    return Request(number, len(prompt), tuple(map(len, responses)))
