"""RL jobs that ask for rewards: bursts, and the project's own client's patience. Knows no replicas but by a router."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from dense_reward.client.errors import ServiceUnavailableError
from dense_reward.client.http import Backoff, Failure, Patience
from dense_reward.errors import RequestError

from bench.scale.cluster import Cluster
from bench.scale.replica import Agenda, Place, Replica, Request

AWAY_SPREAD = 0.2


@dataclass(frozen=True, slots=True)
class Bursts:
    """What one RL job asks: at each step `prompts` with `responses` each, at once; then it trains and samples.

    `response_tokens`: shortest and longest, uniform between. `away_s`: between an answered burst and the next one.
    `together`: all responses of a prompt in one request, else a request each. The rest is its client's.
    """

    prompts: int
    responses: int
    prompt_tokens: int
    response_tokens: tuple[int, int]
    away_s: float
    steps: int
    together: bool = True
    in_flight: int = 100
    timeout_s: float = 600.0
    retry_for_s: float = 600.0

    @property
    def step_tokens(self) -> float:
        """Computed for a step where each prompt is computed once, on average."""
        return self.prompts * (self.prompt_tokens + self.responses * sum(self.response_tokens) / 2)


@dataclass(slots=True)
class Tally:
    """What became of everything that was asked. An attempt ends in an answer, a refusal (429) or a hang-up."""

    step_s: list[float] = field(default_factory=list)
    failed_steps: int = 0
    requests: int = 0
    attempts: int = 0
    answered: int = 0
    refused: int = 0
    hung_up: int = 0
    given_up: int = 0
    scored_tokens: int = 0
    last_s: float = 0.0


@dataclass(slots=True)
class _Asking:
    """A request on its way to an answer."""

    request: Request
    patience: Patience


class RlJob:
    """Asks step after step, each as soon as the one before is answered and trained on."""

    def __init__(
        self, bursts: Bursts, cluster: Cluster, agenda: Agenda, random: np.random.Generator, tally: Tally
    ) -> None:
        self._bursts, self._cluster, self._agenda, self._random, self._tally = bursts, cluster, agenda, random, tally
        self._unsent: deque[Request] = deque()
        self._open = 0
        self._began_s = 0.0
        self._failed = False
        self.steps_left = bursts.steps

    def start(self) -> None:
        """At a random moment of its cycle."""
        self._agenda.after(float(self._random.uniform(0.0, self._bursts.away_s)), self._begin)

    def _begin(self) -> None:
        self._began_s = self._agenda.now_s
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
            patience = Patience(Backoff(), self._bursts.retry_for_s, self._agenda.now_s)
            self._attempt(_Asking(self._unsent.popleft(), patience))

    def _attempt(self, asking: _Asking) -> None:
        replica = self._cluster.replica_for(asking.request)
        self._tally.attempts += 1
        try:
            place = replica.offer(asking.request, lambda: self._answered(asking))
        except RequestError as refusal:
            self._tally.refused += 1
            self._try_again(asking, Failure(refusal, refusal.retry_after_s))
        else:
            self._agenda.after(self._bursts.timeout_s, lambda: self._hang_up(asking, replica, place))

    def _hang_up(self, asking: _Asking, replica: Replica, place: Place) -> None:
        if replica.is_inside(place):
            replica.leave(place)
            self._tally.hung_up += 1
            self._try_again(asking, Failure(TimeoutError("no answer in time")))

    def _try_again(self, asking: _Asking, failure: Failure) -> None:
        try:
            delay_s = asking.patience.delay_s(failure, self._agenda.now_s, float(self._random.random()))
        except ServiceUnavailableError:
            self._tally.given_up += 1
            self._failed = True
            self._end_one()
        else:
            self._agenda.after(delay_s, lambda: self._attempt(asking))

    def _answered(self, asking: _Asking) -> None:
        self._tally.answered += 1
        self._tally.scored_tokens += sum(asking.request.response_tokens)
        self._end_one()

    def _end_one(self) -> None:
        self._open -= 1
        self._tally.last_s = self._agenda.now_s
        if self._open == 0:
            self._end_step()
        else:
            self._send_next()

    def _end_step(self) -> None:
        """The client of a job that got no answer raises: its step is lost. It is taken to go on with the next one."""
        self._tally.step_s.append(self._agenda.now_s - self._began_s)
        self._tally.failed_steps += self._failed
        self.steps_left -= 1
        if self.steps_left:
            spread = float(self._random.uniform(1 - AWAY_SPREAD, 1 + AWAY_SPREAD))
            self._agenda.after(self._bursts.away_s * spread, self._begin)
