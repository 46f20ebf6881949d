"""`Client.score_many` against one service process, compared with the engine fed directly."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dense_reward import Client
from dense_reward.bulk.columns import Columns
from dense_reward.bulk.local_scorer import ScoreTerms, chosen_pair
from dense_reward.serving.loaders import loader
from dense_reward.settings import read_settings
from dense_reward_trainer.runs.local_service import free_port

from bench.engine_alone import GSM8K, engine_seconds, now, since, trunks_of

ROWS, ROUNDS = 400, 8


def client_share(file: Path, pair: Path, folder: Path) -> dict[str, object]:
    """The throughput of one call of `score_many` as a share of that of the engine alone, over the same rows in turn.

    Both compute with one thread; the client has a core of its own.
    """
    lines = file.read_text().splitlines()
    first, lines = lines[ROWS : ROWS + 50], lines[:ROWS]
    slices = [lines[start::ROUNDS] for start in range(ROUNDS)]
    models = {"sft": str(pair / "sft"), "reference": str(pair / "reference"), "threads": "1"}
    settings = chosen_pair(read_settings(models, ()), None)
    loaded = loader("torch")(settings, print, lambda call: call())
    columns, port = Columns(GSM8K, "last", ScoreTerms().columns), free_port()
    flags = [word for name, value in models.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "dense_reward.cli", "serve", *flags, "--port", str(port), "--log-level", "warning"]
    with (folder / "service.log").open("wb") as log:
        service = subprocess.Popen(command, stdout=log, stderr=log)
    shares = []
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            client.wait_until_ready(120)
            scored_seconds(client, first)  # connections, caches of the tokenizer
            for index, rows in enumerate(slices):
                trunks = trunks_of(rows, columns, loaded)
                before = engine_seconds(loaded.engine, trunks, settings.max_batch_tokens)[1] if index % 2 else None
                many = scored_seconds(client, rows)
                alone = before or engine_seconds(loaded.engine, trunks, settings.max_batch_tokens)[1]
                shares.append(alone / many)
                print(f"  round {index}: {many:.1f} s, engine alone {alone:.1f} s", flush=True)
    finally:
        service.terminate()
        service.wait()
    return {"score_many_share": statistics.median(shares), "score_many_shares": shares, "score_many_rows": len(lines)}


def scored_seconds(client: Client, rows: Sequence[str]) -> float:
    """Seconds until `score_many` has answered all rows."""
    items = [{field: json.loads(row)[column] for field, column in GSM8K.items()} for row in rows]
    started = now()
    count = sum(1 for _ in client.score_many(items))
    assert count == len(rows)
    return since(started)[1]
