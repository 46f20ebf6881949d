"""The questions that docs/scale.md answers. Each one simulates several setups."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
from dense_reward.waits import CLIENT_TIMEOUT_S

from bench.reliability.server import percentile
from bench.scale.cluster import Autoscaler, Cluster, Route, Scaling
from bench.scale.jobs import Bursts, RlJob, Tally
from bench.scale.replica import EventQueue, Machine

Row = dict[str, float]
SEED = 0
BURSTS = Bursts(64, 8, prompt_tokens=128, response_tokens=(64, 192), away_s=120.0, steps=40)
"""Same lengths as cell (a) of the speed benchmark, so that its tokens per second apply."""
IMPATIENT = replace(BURSTS, timeout_s=60.0, retry_for_s=120.0)
"""A client that gives up early. BURSTS has the defaults of `dense_reward.Client`, the times of the service."""
RARE = replace(BURSTS, away_s=600.0)
"""Its pauses are longer than an autoscaler waits before it removes replicas."""
IN_PARTS = replace(RARE, in_flight=32)
REPLICAS = (1, 2, 3, 4, 6, 8, 16)
BOUNDS_TOKENS = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144, 1_048_576)
SHORT_BOUND_TOKENS = 16_384
COLD_STARTS_S = (0.0, 15.0, 30.0, 60.0, 120.0, 240.0, 480.0)
GROUPS = (1, 2, 4, 8, 16)
SCALING = Scaling(least=1, most=8, target_tokens=4096, cold_start_s=0.0)
MANY = 100_000


@dataclass(frozen=True, slots=True)
class Setup:
    """Equal jobs on equal replicas."""

    machine: Machine
    replicas: int
    jobs: int = 4
    bursts: Bursts = BURSTS
    route: Route = "least_busy"
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a simulation. `paid_s`: sum of the seconds of all replicas since their start."""

    tally: Tally
    computed_tokens: int
    paid_s: float
    most_replicas: int

    def row(self) -> Row:
        """Figures for plots and tables. Refused and hung-up are shares of attempts: a refused request is sent again."""
        tally = self.tally
        return {
            "step_p50_s": percentile(tally.step_s, 0.5),
            "step_p99_s": percentile(tally.step_s, 0.99),
            "refused_share": tally.refused / tally.attempts,
            "hung_up_share": tally.hung_up / tally.attempts,
            "failed_steps_share": tally.failed_steps / len(tally.step_s),
            "scored_tokens_per_s": tally.scored_tokens / tally.last_s,
            "computed_per_scored": self.computed_tokens / tally.scored_tokens,
            "paid_s_per_step": self.paid_s / len(tally.step_s),
            "most_replicas": self.most_replicas,
        }


def simulate(setup: Setup, seed: int = SEED) -> Outcome:
    """Simulates all steps of all jobs. The same seed gives the same outcome."""
    events, random, tally = EventQueue(), np.random.default_rng(seed), Tally()
    cluster = Cluster(setup.machine, setup.replicas, setup.route, events, random)
    jobs = [RlJob(setup.bursts, cluster, events, random, tally) for _ in range(setup.jobs)]
    for job in jobs:
        job.start()
    if setup.scaling is None:
        events.run()
        return Outcome(tally, cluster.computed_tokens, setup.replicas * tally.last_s, setup.replicas)
    scaler = Autoscaler(cluster, setup.scaling, events, lambda: not any(job.steps_left for job in jobs))
    events.run()
    return Outcome(tally, cluster.computed_tokens, scaler.paid_s, scaler.most_paid)


def formula_s(machine: Machine, bursts: Bursts, replicas: int) -> float:
    """Seconds of a step that uses all replicas alone and keeps them busy until its end."""
    return bursts.step_tokens / (replicas * machine.tokens_per_s)


def by_replicas(machine: Machine) -> Mapping[str, list[Row]]:
    """Step time by number of replicas, with the default bound of the queue and with a short one."""
    short = replace(machine, max_queue_tokens=SHORT_BOUND_TOKENS)
    settings = {
        "one job": Setup(machine, 1, jobs=1),
        "four jobs": Setup(machine, 1),
        "four jobs, short queues": Setup(short, 1),
    }
    return {
        name: [
            {"replicas": count, "formula_s": formula_s(machine, BURSTS, count)}
            | simulate(replace(setup, replicas=count)).row()
            for count in REPLICAS
        ]
        for name, setup in settings.items()
    }


def by_queue_bound(machine: Machine) -> Mapping[str, list[Row]]:
    """Step time by bound of the queue if four jobs share two replicas, for patient and for impatient callers."""
    settings = {f"waits {CLIENT_TIMEOUT_S:.0f} s for an answer": BURSTS, "waits 60 s for an answer": IMPATIENT}
    return {
        name: [
            {"bound_tokens": bound, "bound_s": bound / machine.tokens_per_s}
            | simulate(Setup(replace(machine, max_queue_tokens=bound), 2, bursts=bursts)).row()
            for bound in BOUNDS_TOKENS
        ]
        for name, bursts in settings.items()
    }


def by_cold_start(machine: Machine) -> Mapping[str, list[Row]]:
    """Step time and cost of an autoscaler for one job with long pauses, by seconds until a new replica is ready.

    Compares a client that sends its whole burst with one that holds a part back, and with fixed numbers of replicas.
    """
    at_once, in_parts = Setup(machine, 1, jobs=1, bursts=RARE), Setup(machine, 1, jobs=1, bursts=IN_PARTS)
    scaled = {
        name: [
            {"cold_start_s": seconds} | simulate(replace(setup, scaling=replace(SCALING, cold_start_s=seconds))).row()
            for seconds in COLD_STARTS_S
        ]
        for name, setup in {"64 requests at once": at_once, "32 at a time": in_parts}.items()
    }
    fixed = [{"replicas": count} | simulate(replace(at_once, replicas=count)).row() for count in (1, 2, 4, 8)]
    return {**scaled, "fixed": fixed}


def by_route(machine: Machine) -> Mapping[str, list[Row]]:
    """Cost of sending the responses of a prompt one by one, by route. One job, four replicas."""
    whole = replace(BURSTS, in_flight=MANY)
    apart = replace(whole, together=False)
    settings: dict[str, tuple[Bursts, Route]] = {
        "a request for each prompt": (whole, "least_busy"),
        "a request for each response, round robin": (apart, "round_robin"),
        "..., least busy": (apart, "least_busy"),
        "..., sticky by prompt": (apart, "sticky"),
        "..., sticky, bounded": (apart, "sticky_bounded"),
    }
    return {
        name: [
            {"responses": size} | simulate(Setup(machine, 4, 1, replace(bursts, responses=size), route)).row()
            for size in GROUPS
        ]
        for name, (bursts, route) in settings.items()
    }


QUESTIONS: Mapping[str, Callable[[Machine], Mapping[str, list[Row]]]] = {
    "replicas": by_replicas,
    "queue": by_queue_bound,
    "cold_start": by_cold_start,
    "routing": by_route,
}


def assumptions(machine: Machine) -> dict[str, object]:
    """All assumptions of the answers."""
    return {"machine": asdict(machine), "bursts": asdict(BURSTS), "scaling": asdict(SCALING), "seed": SEED}
