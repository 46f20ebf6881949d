"""RL jobs that request rewards in bursts, with the retries of the project's own client. Sees replicas via a router."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from dense_reward.client.errors import ServiceUnavailableError
from dense_reward.client.http import Backoff, Failure, Patience
from dense_reward.errors import RequestError
from dense_reward.waits import CLIENT_RETRY_FOR_S, CLIENT_TIMEOUT_S

from bench.scale.cluster import Cluster
from bench.scale.replica import Entry, EventQueue, Replica, Request

AWAY_SPREAD = 0.2


@dataclass(frozen=True, slots=True)
class Bursts:
    """Requests of one RL job: each step sends `prompts` with `responses` each in a burst, then trains and samples.

    `response_tokens`: shortest and longest, uniform between. `away_s`: time between an answered burst and the next.
    `together`: one request with all responses of a prompt, else one request per response. `in_flight`, `timeout_s` and
    `retry_for_s` are options of its client.
    """

    prompts: int
    responses: int
    prompt_tokens: int
    response_tokens: tuple[int, int]
    away_s: float
    steps: int
    together: bool = True
    in_flight: int = 100
    timeout_s: float = CLIENT_TIMEOUT_S
    retry_for_s: float = CLIENT_RETRY_FOR_S

    @property
    def step_tokens(self) -> float:
        """Mean number of tokens to compute in a step if each prompt is computed once."""
        return self.prompts * (self.prompt_tokens + self.responses * sum(self.response_tokens) / 2)


@dataclass(slots=True)
class Tally:
    """Counts of all requests and their attempts. An attempt ends in an answer, a refusal (429) or a hang-up."""

    step_s: list[float] = field(default_factory=list)
    failed_steps: int = 0
    requests: int = 0
    attempts: int = 0
    answered: int = 0
    refused: int = 0
    hung_up: int = 0
    failed: int = 0
    scored_tokens: int = 0
    last_s: float = 0.0


@dataclass(slots=True)
class _Call:
    """A request that is not answered yet."""

    request: Request
    patience: Patience


class RlJob:
    """Sends one burst after another; the next one after the job has trained on all answers of the previous one."""

    def __init__(
        self, bursts: Bursts, cluster: Cluster, events: EventQueue, random: np.random.Generator, tally: Tally
    ) -> None:
        self._bursts, self._cluster, self._events, self._random, self._tally = bursts, cluster, events, random, tally
        self._unsent: deque[Request] = deque()
        self._open = 0
        self._began_s = 0.0
        self._failed = False
        self.steps_left = bursts.steps

    def start(self) -> None:
        """Begins at a random time within `away_s`."""
        self._events.after(float(self._random.uniform(0.0, self._bursts.away_s)), self._begin)

    def _begin(self) -> None:
        self._began_s = self._events.now_s
        self._unsent.extend(self._drawn())
        self._open = len(self._unsent)
        self._failed = False
        self._tally.requests += self._open
        for _ in range(min(self._bursts.in_flight, self._open)):
            self._send_next()

    def _drawn(self) -> list[Request]:
        bursts, requests = self._bursts, []
        shortest, longest = bursts.response_tokens
        for _ in range(bursts.prompts):
            prompt = int(self._random.integers(2**62))
            lengths = self._random.integers(shortest, longest, bursts.responses, endpoint=True).tolist()
            groups = [tuple(lengths)] if bursts.together else [(length,) for length in lengths]
            requests += [Request(prompt, bursts.prompt_tokens, group) for group in groups]
        return requests

    def _send_next(self) -> None:
        if self._unsent:
            patience = Patience(Backoff(), self._bursts.retry_for_s, self._events.now_s)
            self._attempt(_Call(self._unsent.popleft(), patience))

    def _attempt(self, call: _Call) -> None:
        replica = self._cluster.replica_for(call.request)
        self._tally.attempts += 1
        try:
            entry = replica.submit(call.request, lambda: self._answered(call))
        except RequestError as refusal:
            self._tally.refused += 1
            self._try_again(call, Failure(refusal, refusal.retry_after_s))
        else:
            self._events.after(self._bursts.timeout_s, lambda: self._hang_up(call, replica, entry))

    def _hang_up(self, call: _Call, replica: Replica, entry: Entry) -> None:
        if replica.holds(entry):
            replica.cancel(entry)
            self._tally.hung_up += 1
            self._try_again(call, Failure(TimeoutError("no answer in time")))

    def _try_again(self, call: _Call, failure: Failure) -> None:
        try:
            delay_s = call.patience.delay_s(failure, self._events.now_s, float(self._random.random()))
        except ServiceUnavailableError:
            self._tally.failed += 1
            self._failed = True
            self._end_one()
        else:
            self._events.after(delay_s, lambda: self._attempt(call))

    def _answered(self, call: _Call) -> None:
        self._tally.answered += 1
        self._tally.scored_tokens += sum(call.request.response_tokens)
        self._end_one()

    def _end_one(self) -> None:
        self._open -= 1
        self._tally.last_s = self._events.now_s
        if self._open == 0:
            self._end_step()
        else:
            self._send_next()

    def _end_step(self) -> None:
        """A step with a failed request is lost, because the client raises; the job continues with the next step."""
        self._tally.step_s.append(self._events.now_s - self._began_s)
        self._tally.failed_steps += self._failed
        self.steps_left -= 1
        if self.steps_left:
            spread = float(self._random.uniform(1 - AWAY_SPREAD, 1 + AWAY_SPREAD))
            self._events.after(self._bursts.away_s * spread, self._begin)
