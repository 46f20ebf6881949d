"""The simulated cluster loses no request, waits as queueing theory predicts, and is the same for the same seed."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from bench.scale import page
from bench.scale.cluster import Route, Scaling
from bench.scale.jobs import Bursts
from bench.scale.questions import Outcome, Setup, formula_s, simulate
from bench.scale.replica import EventQueue, Machine, Replica, Request
from bench.scale.validation import Cell, Overload, closed_loop, measured_machine, open_loop, overload_measured
from bench.tables import block_of

pytestmark = pytest.mark.slow

MACHINE = Machine(1000.0, jitter=0.05, max_batch_tokens=2000)
BURSTS = Bursts(8, 4, prompt_tokens=100, response_tokens=(50, 150), away_s=20.0, steps=6)
ONE_BY_ONE = Machine(1000.0, max_batch_tokens=1000)
"""A machine on which each of `equal_requests` is a separate batch and takes one second."""


def equal_requests() -> Iterator[Request]:
    return (Request(number, 500, (500,)) for number in itertools.count())


def short_queue(tokens: int) -> Machine:
    return replace(MACHINE, max_queue_tokens=tokens)


SETUPS = {
    "roomy": Setup(MACHINE, 2, jobs=3, bursts=BURSTS),
    "full": Setup(short_queue(2000), 1, jobs=4, bursts=BURSTS),
    "hopeless": Setup(short_queue(1000), 1, jobs=4, bursts=replace(BURSTS, retry_for_s=3.0)),
    "impatient": Setup(MACHINE, 1, jobs=4, bursts=replace(BURSTS, timeout_s=5.0, retry_for_s=20.0)),
    "autoscaled": Setup(MACHINE, 1, jobs=3, bursts=BURSTS, scaling=Scaling(1, 4, 1000, 5.0, settle_s=15.0)),
    "apart": Setup(MACHINE, 2, jobs=3, bursts=replace(BURSTS, together=False), route="sticky_bounded"),
}


@pytest.mark.parametrize("name", SETUPS)
def test_every_request_ends_in_an_answer_or_is_given_up(name: str) -> None:
    setup = SETUPS[name]
    outcome = simulate(setup)
    tally, bursts = outcome.tally, setup.bursts
    each = 1 if bursts.together else bursts.responses
    assert tally.requests == setup.jobs * bursts.steps * bursts.prompts * each
    assert tally.answered + tally.failed == tally.requests
    assert tally.answered + tally.refused + tally.hung_up == tally.attempts
    assert len(tally.step_s) == setup.jobs * bursts.steps


def test_each_way_out_is_taken() -> None:
    tallies = {name: simulate(setup).tally for name, setup in SETUPS.items()}
    assert tallies["roomy"].attempts == tallies["roomy"].answered
    assert tallies["full"].refused > 0
    assert tallies["full"].failed == 0
    assert tallies["hopeless"].failed > 0
    assert tallies["hopeless"].failed_steps > 0
    assert tallies["impatient"].hung_up > 0
    assert simulate(SETUPS["autoscaled"]).most_replicas > 1


def test_whole_groups_are_computed_once_to_the_token() -> None:
    outcome = simulate(SETUPS["full"])
    prompts = outcome.tally.requests * BURSTS.prompt_tokens
    assert outcome.computed_tokens == outcome.tally.scored_tokens + prompts


def test_the_same_seed_gives_the_same_and_another_one_does_not() -> None:
    setup = SETUPS["autoscaled"]
    assert simulate(setup, 1) == simulate(setup, 1)
    assert simulate(setup, 1) != simulate(setup, 2)


@pytest.mark.parametrize(("load", "seconds"), [(0.5, 15_000), (0.8, 40_000)])
def test_mean_wait_is_that_of_a_queue_with_random_arrivals_and_equal_services(load: float, seconds: float) -> None:
    """In an M/D/1 queue the mean wait is load / (2 (1 - load)) service times."""
    calls = open_loop(ONE_BY_ONE, equal_requests(), load, seconds, seed=1)
    waits_s = np.array(calls.answered_s) - 1.0
    assert calls.refused == 0
    assert waits_s.mean() == pytest.approx(load / (2 * (1 - load)), rel=0.04)


@pytest.mark.parametrize(("load", "places"), [(0.9, 3), (1.5, 5)])
def test_so_many_are_refused_as_a_queue_of_so_many_places_refuses(load: float, places: int) -> None:
    """An M/D/1/K queue, solved as a Markov chain of the number of requests left at each departure."""
    machine = replace(ONE_BY_ONE, max_queue_tokens=1000 * places)
    calls = open_loop(machine, equal_requests(), load, seconds=20_000, seed=1)
    assert calls.refused / calls.sent == pytest.approx(refused_share(load, places), abs=0.01)


def refused_share(load: float, places: int) -> float:
    arrivals = [math.exp(-load) * load**n / math.factorial(n) for n in range(places)]
    step = np.zeros((places, places))
    for left in range(places):
        start = max(left - 1, 0)
        step[left, start : places - 1] = arrivals[: places - 1 - start]
        step[left, places - 1] = 1 - step[left].sum()
    stationary = np.linalg.matrix_power(step, 1000)[0]
    return float(1 - 1 / (stationary[0] + load))


def test_callers_that_ask_again_at_once_keep_a_replica_busy() -> None:
    calls = closed_loop(ONE_BY_ONE, equal_requests(), callers=3, seconds=500, seed=0)
    assert len(calls.answered_s) == pytest.approx(calls.last_s)
    assert calls.answered_s[10] == pytest.approx(3.0)


def test_a_burst_that_has_all_replicas_takes_what_the_formula_says() -> None:
    machine = Machine(1000.0, max_batch_tokens=2000)
    for count in (1, 2, 4):
        outcome = simulate(Setup(machine, count, jobs=1, bursts=replace(BURSTS, prompts=64)))
        expected_s = formula_s(machine, replace(BURSTS, prompts=64), count)
        assert float(np.mean(outcome.tally.step_s)) == pytest.approx(expected_s, rel=0.1)


def routed(route: Route, *, together: bool = False) -> Outcome:
    bursts = replace(BURSTS, together=together, prompts=32, in_flight=1000)
    machine = replace(MACHINE, jitter=0.0, max_batch_tokens=4000)
    return simulate(Setup(machine, 4, jobs=1, bursts=bursts, route=route))


def test_sticky_routing_computes_fewer_tokens() -> None:
    whole = routed("least_busy", together=True)
    sticky, bounded, scattered = routed("sticky"), routed("sticky_bounded"), routed("round_robin")
    assert whole.tally.scored_tokens == scattered.tally.scored_tokens == sticky.tally.scored_tokens
    assert whole.computed_tokens <= sticky.computed_tokens < 0.9 * scattered.computed_tokens
    assert sticky.computed_tokens <= bounded.computed_tokens < scattered.computed_tokens


def test_a_replica_that_comes_too_late_gains_nothing_and_one_that_comes_at_once_does() -> None:
    bursts = replace(BURSTS, prompts=64)
    machine = replace(MACHINE, jitter=0.0)

    def steps_s(cold_start_s: float) -> list[float]:
        scaling = Scaling(1, 4, 1000, cold_start_s, every_s=1.0)
        return simulate(Setup(machine, 1, jobs=1, bursts=bursts, scaling=scaling)).tally.step_s

    alone = simulate(Setup(machine, 1, jobs=1, bursts=bursts)).tally.step_s
    assert steps_s(1e6) == pytest.approx(alone)
    assert steps_s(0.0)[-1] < alone[-1] / 2


def test_who_hangs_up_takes_its_waiting_work_along() -> None:
    events = EventQueue()
    replica = Replica(ONE_BY_ONE, events, np.random.default_rng(0))
    answered: list[int] = []
    requests = list(itertools.islice(equal_requests(), 3))
    entries = [replica.submit(one, lambda number=one.prompt: answered.append(number)) for one in requests]  # type: ignore[misc]
    replica.cancel(entries[0])  # in the current batch
    replica.cancel(entries[1])
    assert replica.admission.held_tokens == 1000
    events.run()
    assert answered == [2]
    assert replica.computed_tokens == 2000
    assert replica.admission.held_tokens == 0


def test_a_machine_is_read_from_what_was_measured() -> None:
    def cell(*seconds: float) -> Cell:
        return {"rounds": [{"service": {"latencies_s": [one]}} for one in seconds]}

    machine = measured_machine({"d_40m": cell(0.356), "a_40m": cell(4.708, 4.708, 4.708)})
    assert machine.tokens_per_s == pytest.approx(1000)
    assert machine.overhead_s == pytest.approx(0.1)
    assert machine.jitter == 0.0


def test_the_measured_experiment_is_read() -> None:
    closed = {"statuses": {"200": 3}, "answered_p50_ms": 1.0, "answered_p99_ms": 2.0}
    experiment: Overload = {
        "figures": {"goodput_ratio": 0.9},
        "requests_per_s": {"capacity": 1.0},
        "closed": closed,  # type: ignore[typeddict-item]
        "open": {"statuses": {"200": 3, "429": 1}, "answered_p50_ms": 3.0, "answered_p99_ms": 4.0},
    }
    found = overload_measured(experiment)
    assert (found["goodput_ratio"], found["refusal_share"], found["open_p99_ms"]) == (0.9, 0.25, 4.0)


def test_the_page_holds_the_tables_of_the_results() -> None:
    for name, body in page.blocks().items():
        assert block_of(page.PAGE, name) == body, "run `python -m bench.scale page`"
