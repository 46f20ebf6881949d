"""Hostile checkpoints beside a served pair: are they refused, and what do its callers notice? How long is a reload?

A load is repeated until it has been under way for a while: otherwise its percentiles would be those of a few requests.
"""

import asyncio
import json
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import httpx2

from bench.hostile.checkpoint_corpus import HOSTILE, write_hostile
from bench.hostile.checkpoint_parts import write_parts
from bench.reliability.server import Server, percentile, serving

Json = dict[str, object]
KEY = "key-of-this-benchmark"
IDS = {"prompt_ids": [1, 2, 3], "response_ids": [[4, 5, 6, 7], [8, 9, 10]], "include": ["reward"]}
QUIET_S, BESIDE_S = 15.0, 1.5
PAUSE_S = {"/score": 0.004, "/health": 0.001}
RELOADS = 20
Result = TypeVar("Result")
Seen = list[tuple[float, float]]
"""When each answer came, and the seconds that it took."""


def measure() -> tuple[Json, Json]:
    """The figures, and per checkpoint what was said and the p99 of the served pair's caller in ms."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        root = Path(name) / "checkpoints"
        healthy = root / "healthy"
        write_parts(healthy)
        pairs = {each: write_hostile(healthy, each, root / "hostile" / str(at)) for at, each in enumerate(HOSTILE)}
        entry = {"name": "bench", "key": KEY, "rights": ["score", "admin"]}
        (root.parent / "keys.json").write_text(json.dumps([entry]))
        pair = ("--sft", str(healthy / "sft"), "--reference", str(healthy / "reference"))
        keys = ("--api-keys-file", str(root.parent / "keys.json"), "--checkpoints-folder", str(root))
        with serving(*pair, *keys) as server:
            return asyncio.run(_measure(server, healthy, pairs))


async def _measure(server: Server, healthy: Path, pairs: dict[str, tuple[Path, Path]]) -> tuple[Json, Json]:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx2.AsyncClient(base_url=server.url, timeout=300.0, headers=headers, trust_env=False) as client:
        await _while_asking(client, "/score", lambda: asyncio.sleep(3.0))  # warm up
        _, before = await _while_asking(client, "/score", lambda: asyncio.sleep(QUIET_S))
        refused, cases = 0, {}
        all_seen: Seen = []
        for name, folders in pairs.items():
            answer, seen = await _beside(client, *folders)
            is_refused = answer.status_code == 422 and re.search(HOSTILE[name].says, answer.text) is not None
            refused += is_refused
            all_seen += seen
            cases[name] = {"refused": is_refused, "p99_ms": _p99_ms(seen), "worst_ms": _worst_ms(seen)}
            print(f"  {name}: {cases[name]}", file=sys.stderr, flush=True)
        _, after = await _while_asking(client, "/score", lambda: asyncio.sleep(QUIET_S))
        stops = [await _stop_ms(client, healthy, ("adapter", "sft")[at % 2]) for at in range(RELOADS)]
    quiet = _p99_ms(before + after)
    worst = max(cases, key=lambda name: float(cases[name]["p99_ms"]))
    figures: Json = {
        "checkpoints_tried": len(pairs),
        "checkpoints_refused": refused,
        "served_p99_ratio": round(_p99_ms(all_seen) / quiet, 2),
        "worst_reload_stop_ms": round(max(stops), 1),
    }
    details: Json = {
        "served_p99_quiet_ms": quiet,
        "served_p99_beside_ms": _p99_ms(all_seen),
        "worst_checkpoint": worst,
        "reload_stops_ms": [round(stop, 1) for stop in stops],
        "checkpoints": cases,
    }
    return figures, details


async def _beside(client: httpx2.AsyncClient, sft: Path, reference: Path) -> tuple[httpx2.Response, Seen]:
    """The last answer of repeated loads, and what a caller of the served pair saw meanwhile."""

    async def repeat() -> httpx2.Response:
        end_s = time.monotonic() + BESIDE_S
        while True:
            answer = await _load(client, sft, reference)
            if time.monotonic() >= end_s or answer.status_code != 422:
                return answer

    return await _while_asking(client, "/score", repeat)


async def _stop_ms(client: httpx2.AsyncClient, healthy: Path, source: str) -> float:
    """The longest answer of /health while a pair is replaced: for so long nothing else was done."""

    async def reload() -> None:
        (await _load(client, healthy / source, healthy / "reference")).raise_for_status()

    _, seen = await _while_asking(client, "/health", reload)
    return _worst_ms(seen)


async def _load(client: httpx2.AsyncClient, sft: Path, reference: Path) -> httpx2.Response:
    return await client.post("/admin/models", json={"name": "other", "sft": str(sft), "reference": str(reference)})


async def _while_asking(
    client: httpx2.AsyncClient, path: str, call: Callable[[], Awaitable[Result]]
) -> tuple[Result, Seen]:
    """The result of a call, and the answers to one caller that asks again and again meanwhile."""
    seen: Seen = []

    async def ask() -> None:
        while True:
            before = time.perf_counter()
            answer = await (client.get(path) if path == "/health" else client.post(path, json=IDS))
            answer.raise_for_status()
            seen.append((time.perf_counter(), time.perf_counter() - before))
            await asyncio.sleep(PAUSE_S[path])

    asking = asyncio.create_task(ask())
    try:
        result = await call()
        await asyncio.sleep(0.05)  # what was asked for during the call is answered after it
    finally:
        asking.cancel()
    await asyncio.wait([asking])
    if not asking.cancelled():
        asking.result()
    return result, seen


def _p99_ms(seen: Seen) -> float:
    return round(1e3 * percentile([took for _, took in seen], 0.99), 2)


def _worst_ms(seen: Seen) -> float:
    return round(1e3 * max((took for _, took in seen), default=0.0), 2)
