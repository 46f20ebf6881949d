"""Stage: the real service over HTTP, with a pair that is made on the device: seconds of requests, and throughput."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dense_reward import Client
from dense_reward.records import Trunk

from bench.gpu.machine import Machine, Record, trunks_of
from bench.speed.contestants import Service
from bench.speed.inputs import ROLES, make_checkpoint
from bench.speed.workload import SHAPES, Lengths

REQUESTS: dict[str, Lengths] = {
    "a: 8 x (128 + 8 x 128)": ((128, (128,) * 8),) * 8,
    "b: 512 + 8 x 1024": ((512, (1024,) * 8),),
    "d: 1 x (128 + 128)": ((128, (128,)),),
}
ROUNDS, CALLERS = 9, 8
Item = dict[str, object]


def stage(machine: Machine, record: Record) -> None:
    """Seconds of each kind of request, alone; and tokens per second of eight callers at once."""
    shape = machine.shape(SHAPES["15b"])
    with tempfile.TemporaryDirectory() as folder:
        for seed, role in enumerate(ROLES):
            make_checkpoint(shape, Path(folder) / role, role, seed)
        dtype, log = "float32" if machine.tiny else "bfloat16", Path(folder, "service.log")
        started_s = time.perf_counter()
        service = Service(Path(folder), dtype=dtype, device=machine.device.type, threads=1, log=log)
        with service, service.client() as client:
            record(start_s=time.perf_counter() - started_s)
            for name, lengths in REQUESTS.items():
                requests = [
                    _items(trunks_of(machine.lengths(lengths), shape.vocab_size, seed)) for seed in range(ROUNDS)
                ]
                record(**{name: _alone(client, requests)})
            record(**{f"{CALLERS} callers": _together(client, machine, shape.vocab_size)})


def _items(trunks: Sequence[Trunk]) -> list[Item]:
    return [
        {"prompt_ids": trunk.prompt_P.tolist(), "response_ids": [branch.ids_T.tolist() for branch in trunk.branches]}
        for trunk in trunks
    ]


def _alone(client: Client, requests: Sequence[list[Item]]) -> dict[str, float]:
    """Medians of the seconds that a caller waits and that the models compute; the first request does not count."""
    waited_s, computed_s = [], []
    for items in requests:
        started_s = time.perf_counter()
        answer = client.score_items(items)
        waited_s.append(time.perf_counter() - started_s)
        computed_s.append(answer.timing.compute_s)
    return {"waited_s": statistics.median(waited_s[1:]), "computed_s": statistics.median(computed_s[1:])}


def _together(client: Client, machine: Machine, vocab_size: int) -> dict[str, float]:
    """Rewards per second while several callers send (a) without a pause."""
    lengths = machine.lengths(REQUESTS["a: 8 x (128 + 8 x 128)"])
    requests = [_items(trunks_of(lengths, vocab_size, 100 + seed)) for seed in range(CALLERS * ROUNDS)]
    started_s = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as callers:
        tokens = sum(answer.usage.response_tokens for answer in callers.map(client.score_items, requests))
    return {"rewards_per_s": tokens / (time.perf_counter() - started_s), "tokens": tokens}
