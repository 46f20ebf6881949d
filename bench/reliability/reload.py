"""Pairs replaced under load, every tenth time by a broken one: no request must fail or mix revisions."""

import asyncio
import json
import random
import shutil
import tempfile
from pathlib import Path

import httpx2

from bench.reliability.load import Json, Known, client_of, requests, with_answers
from bench.reliability.server import PAIR, Server, serving

RELOADS, BROKEN_EVERY, CONCURRENCY = 50, 10, 8
KEY = "key-of-this-benchmark"
HEADERS = {"Authorization": f"Bearer {KEY}"}
REFERENCES = ("reference", "early")


def measure_reload() -> tuple[Json, Json]:
    """Counts failed requests, answers of the wrong revision, and reloads with an unexpected status."""
    with tempfile.TemporaryDirectory(dir=PAIR) as name:
        folder = Path(name)
        (folder / "keys.json").write_text(json.dumps([{"name": "bench", "key": KEY, "rights": ["score", "admin"]}]))
        broken = folder / "broken"
        shutil.copytree(PAIR / "early", broken)
        with (broken / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xff")
        keys = ("--api-keys-file", str(folder / "keys.json"), "--checkpoints-folder", str(PAIR))
        with serving(*keys, "--open-metrics") as server:
            return asyncio.run(_reload(server, broken))


async def _reload(server: Server, broken: Path) -> tuple[Json, Json]:
    known = requests(50)
    expected: dict[str, list[Known]] = {}
    async with client_of(server) as client:
        client.headers.update(HEADERS)
        for reference in REFERENCES:
            revision = str((await _load(client, PAIR / reference)).json()["revision"])
            expected[revision] = await with_answers(server, known, HEADERS)
        counts, over = {"answers": 0, "failed": 0, "inconsistent": 0}, asyncio.Event()
        callers = [asyncio.create_task(_keep_asking(client, expected, counts, over)) for _ in range(CONCURRENCY)]
        outcomes = []
        for turn in range(1, RELOADS + 1):
            is_broken = turn % BROKEN_EVERY == 0
            answer = await _load(client, broken if is_broken else PAIR / REFERENCES[turn % 2])
            wanted = httpx2.codes.UNPROCESSABLE_ENTITY if is_broken else httpx2.codes.OK
            outcomes.append(answer.status_code == wanted)
        over.set()
        await asyncio.gather(*callers)
    failed = counts["failed"] + counts["inconsistent"] + outcomes.count(False)
    return {"reload_failed": failed}, {"reloads": RELOADS, "as_wanted": outcomes.count(True), **counts}


async def _load(client: httpx2.AsyncClient, reference: Path) -> httpx2.Response:
    pair = {"name": "default", "sft": str(PAIR / "sft"), "reference": str(reference)}
    return await client.post("/admin/models", json=pair)


async def _keep_asking(
    client: httpx2.AsyncClient, expected: dict[str, list[Known]], counts: dict[str, int], over: asyncio.Event
) -> None:
    draw = random.Random(0)
    while not over.is_set():
        at = draw.randrange(len(next(iter(expected.values()))))
        body = next(iter(expected.values()))[at].body
        answer = await client.post("/score", json=body)
        counts["answers"] += 1
        if answer.status_code != httpx2.codes.OK:
            counts["failed"] += 1
            continue
        known = expected.get(answer.json()["model"]["revision"])
        counts["inconsistent"] += known is None or not known[at].is_right(answer.json())
