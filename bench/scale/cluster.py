"""Several replicas: routing and autoscaling. Must not know callers."""

import itertools
import math
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.scale.replica import EventQueue, Machine, Replica, Request

Route = Literal["round_robin", "least_busy", "sticky", "sticky_bounded"]
BOUND = 1.25
"""sticky_bounded: no replica gets more than this multiple of the average number of requests (haproxy's
hash-balance-factor 125)."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Kubernetes' horizontal autoscaler over `sum(dense_reward_queue_tokens)`, with its defaults.

    One replica for every `target_tokens` in all queues, between `least` and `most`, evaluated every `every_s`. A step
    up at most doubles the replicas or adds four. It scales down only to the highest count that it wanted in the last
    `settle_s` seconds.
    """

    least: int
    most: int
    target_tokens: int
    cold_start_s: float
    every_s: float = 15.0
    settle_s: float = 300.0


class Cluster:
    """Replicas behind a router."""

    def __init__(
        self, machine: Machine, replicas: int, route: Route, events: EventQueue, random: np.random.Generator
    ) -> None:
        self._machine, self._events, self._random = machine, events, random
        self.replicas = [self._new() for _ in range(replicas)]
        self.all_replicas = list(self.replicas)
        self.starting = 0
        self._turn = itertools.count()
        self._route = {
            "round_robin": self._round_robin,
            "least_busy": self._least_busy,
            "sticky": self._sticky,
            "sticky_bounded": self._sticky_bounded,
        }[route]

    def replica_for(self, request: Request) -> Replica:
        return self._route(request)

    @property
    def queue_tokens(self) -> int:
        """Sum over the ready replicas, as Prometheus computes it."""
        return sum(replica.admission.held_tokens for replica in self.replicas)

    @property
    def computed_tokens(self) -> int:
        return sum(replica.computed_tokens for replica in self.all_replicas)

    @property
    def paid_replicas(self) -> int:
        """Replicas that are ready, starting, or draining."""
        draining = [one for one in self.all_replicas if one not in self.replicas and one.requests_inside]
        return len(self.replicas) + self.starting + len(draining)

    def start(self, cold_start_s: float) -> None:
        """Starts one more replica, which is ready after `cold_start_s`."""
        self.starting += 1
        self._events.after(cold_start_s, self._join)

    def retire(self) -> None:
        """Stops new requests to the least busy replica. It finishes the requests that it has."""
        self.replicas.remove(min(self.replicas, key=lambda replica: replica.requests_inside))

    def _join(self) -> None:
        self.starting -= 1
        self.replicas.append(self._new())
        self.all_replicas.append(self.replicas[-1])

    def _new(self) -> Replica:
        return Replica(self._machine, self._events, self._random)

    def _round_robin(self, _: Request) -> Replica:
        return self.replicas[next(self._turn) % len(self.replicas)]

    def _least_busy(self, _: Request) -> Replica:
        """Breaks ties in turn."""
        start = next(self._turn) % len(self.replicas)
        in_turn = self.replicas[start:] + self.replicas[:start]
        return min(in_turn, key=lambda replica: replica.requests_inside)

    def _sticky(self, request: Request) -> Replica:
        return self.replicas[_hash(request) % len(self.replicas)]

    def _sticky_bounded(self, request: Request) -> Replica:
        """The prompt's replica, or the next one on the ring whose share is not exceeded."""
        count = len(self.replicas)
        share = BOUND * (1 + sum(replica.requests_inside for replica in self.replicas)) / count
        ring = [self.replicas[(_hash(request) + step) % count] for step in range(count)]
        return next(replica for replica in ring if replica.requests_inside < share)


def _hash(request: Request) -> int:
    return zlib.crc32(request.prompt.to_bytes(8, "little"))


class Autoscaler:
    """Starts and retires replicas by the length of the queues, until `is_over`.

    `paid_s` grows with each second of each replica, including those that are starting.
    """

    def __init__(self, cluster: Cluster, scaling: Scaling, events: EventQueue, is_over: Callable[[], bool]) -> None:
        self.paid_s = 0.0
        self.most_paid = scaling.least
        self._cluster, self._scaling, self._events, self._is_over = cluster, scaling, events, is_over
        evaluations = max(1, math.ceil(scaling.settle_s / scaling.every_s))
        self._wanted: deque[int] = deque(maxlen=evaluations)
        events.after(0.0, self._evaluate)

    def _evaluate(self) -> None:
        if self._is_over():
            return
        cluster, scaling = self._cluster, self._scaling
        wanted = math.ceil(cluster.queue_tokens / scaling.target_tokens)
        self._wanted.append(min(max(wanted, scaling.least), scaling.most))
        current = len(cluster.replicas) + cluster.starting
        for _ in range(current, min(self._wanted[-1], max(2 * current, current + 4))):
            cluster.start(scaling.cold_start_s)
        for _ in range(max(self._wanted), min(current, len(cluster.replicas))):
            cluster.retire()
        self.paid_s += scaling.every_s * cluster.paid_replicas
        self.most_paid = max(self.most_paid, cluster.paid_replicas)
        self._events.after(scaling.every_s, self._evaluate)
