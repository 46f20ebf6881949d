"""Measures `dense-reward score`: python -m bench.bulk FILE [--run FOLDER] [--only killed,overhead,client,ray].

FILE is GSM8K's training set, JSON lines of question and answer. `killed`: 100,000 rows with the fake engine and three
`kill -9`, and the memory at 10,000 and 100,000 rows. `overhead`: 5,000 rows of FILE against the engine alone, on the
same slices in turn. `client`: `score_many` against one service, compared with the engine alone. `ray`: rows of FILE on
Ray Data with two local workers, against the rows without Ray. Each part replaces its own numbers in
bench/results/bulk.json, which names the commit and the load of each part.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dense_reward.bulk.columns import Columns
from dense_reward.bulk.job import Job, opened, score
from dense_reward.bulk.local_scorer import LocalScorer, ScoreTerms, chosen_pair
from dense_reward.bulk.sources import open_source
from dense_reward.serving.loaders import LoadedPair, loader
from dense_reward.settings import Settings, read_settings

from bench.bulk_client import client_share
from bench.circumstances import circumstances
from bench.engine_alone import GSM8K, Seconds, engine_seconds, now, since, trunks_of
from bench.engines import trained

RESULTS = Path("bench/results/bulk.json")
ROWS, FEWER_ROWS, KILLS = 100_000, 10_000, 3
REAL_ROWS, SLICES, RAY_ROWS = 5_000, 10, 5_000
TOLERANCE_NATS = 1e-4
Json = dict[str, object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 after everything is measured and written."""
    parser = argparse.ArgumentParser(prog="python -m bench.bulk", description=__doc__)
    parser.add_argument("file", type=Path, help="GSM8K's training set, JSON lines of question and answer")
    parser.add_argument(
        "--run", type=Path, help="folder of a finished SFT run on FILE; if left out, a short one is made"
    )
    parser.add_argument("--only", default="killed,overhead,client,ray", help="parts to measure, separated by commas")
    options = parser.parse_args(arguments)
    here = circumstances()  # read first: the results of this run make the checkout dirty
    found: Json = {}
    pair = None
    with tempfile.TemporaryDirectory() as folder:
        for part in options.only.split(","):
            print(f"{part} ...", flush=True)
            if part == "killed":
                found |= killed(Path(folder))
            else:
                pair = pair or (options.run / "checkpoints" if options.run else trained(options.file))
                measure = {"overhead": overhead, "client": client_share, "ray": with_ray}[part]
                found |= measure(options.file, pair, Path(folder))
            before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # parts can run side by side
            measured = before.get("circumstances", {}) | {part: {"load_average": os.getloadavg()[0], **here}}
            found = before | found | {"circumstances": measured}
            RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2), f"wrote {RESULTS}", sep="\n")
    return 0


def command(file: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "dense_reward.cli", "score", str(file), "--out", str(out), *options]


def killed(folder: Path) -> Json:
    """Rows that were lost or written twice over three `kill -9`, and peaks of memory."""
    peaks = {}
    for rows in (FEWER_ROWS, ROWS):
        file, out = folder / f"{rows}.jsonl", folder / f"{rows}.out.jsonl"
        with file.open("w") as lines:
            lines.writelines(json.dumps({"prompt": f"{row}+1", "response": f"{row + 1}"}) + "\n" for row in range(rows))
        kills = KILLS if rows == ROWS else 0
        peaks[rows] = finished(command(file, out, "--engine", "fake"), out, rows, kills)
    numbers = Counter(json.loads(line)["row"] for line in out.open())
    return {
        "rows": ROWS,
        "kills": KILLS,
        "rows_lost": sum(row not in numbers for row in range(ROWS)),
        "rows_double": sum(count - 1 for count in numbers.values()),
        "peak_bytes_10k_rows": peaks[FEWER_ROWS],
        "peak_bytes_100k_rows": peaks[ROWS],
    }


def finished(run: Sequence[str], out: Path, rows: int, kills: int) -> int:
    """Runs a command until it ends by itself, after killing it at different places. Returns the peak of memory."""
    places = [round(rows * (kill + random.random()) / kills) for kill in range(kills)]
    peak = 0
    while True:
        process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            if places and lines_of(out) > places[0]:
                places.pop(0)
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.05)
        if process.returncode != -signal.SIGKILL:
            if process.returncode:
                raise RuntimeError(f"{' '.join(run)} ended with {process.returncode}")
            assert not places, "the process ended before it was killed"
            return peak


def lines_of(out: Path) -> int:
    return (
        int(subprocess.run(["wc", "-l", str(out)], capture_output=True, text=True, check=True).stdout.split()[0])
        if out.exists()
        else 0
    )


def peak_bytes(process: int) -> int:
    """The peak of a process's resident memory until now; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def overhead(file: Path, pair: Path, folder: Path) -> Json:
    """How much more CPU time a whole job takes than the engine alone for the same rows, without loading.

    CPU time, because other programs on the machine do not change it; both compute with one thread. Reading, encoding
    and writing overlap with computing, so on a machine with a free core the seconds differ by less.
    """
    lines = file.read_text().splitlines()[: int(os.environ.get("BULK_ROWS", REAL_ROWS))]
    slices = [lines[start::SLICES] for start in range(SLICES)]
    given = {"sft": str(pair / "sft"), "reference": str(pair / "reference"), "threads": "1"}
    settings = chosen_pair(read_settings(given, ()), None)
    loaded = loader("torch")(settings, print, lambda call: call())
    seconds = asyncio.run(_both(settings, loaded, slices, folder))
    tokens = sum(count for _, _, count in seconds)
    cpu, wall = ([(whole[kind], alone[kind]) for whole, alone, _ in seconds] for kind in (0, 1))
    return {
        "real_rows": len(lines),
        "tokens": tokens,
        "overhead": total(cpu),
        "overhead_of_slices": [whole / alone - 1 for whole, alone in cpu],
        "overhead_wall": total(wall),
        "overhead_wall_of_slices": [whole / alone - 1 for whole, alone in wall],
        "tokens_per_s": tokens / sum(whole for whole, _ in wall),
        "engine_tokens_per_s": tokens / sum(alone for _, alone in wall),
    }


def total(seconds: Sequence[Seconds]) -> float:
    return sum(whole for whole, _ in seconds) / sum(alone for _, alone in seconds) - 1


@dataclass
class Computed:
    """The tokens that the engine computed, prompts included."""

    tokens: int = 0

    def __call__(self, rows: int, tokens: int) -> None:
        self.tokens += tokens


async def _both(
    settings: Settings, loaded: LoadedPair, slices: Sequence[Sequence[str]], folder: Path
) -> list[tuple[Seconds, Seconds, int]]:
    """CPU seconds and seconds of the whole job, the same of the engine alone, and the tokens of each slice."""
    scorer = LocalScorer(settings, ScoreTerms())
    await scorer.start()
    columns = Columns(GSM8K, "last", ScoreTerms().columns)
    found = []
    for index, lines in enumerate(slices):
        file = folder / f"slice{index}.jsonl"
        file.write_text("\n".join(lines) + "\n")
        trunks = trunks_of(lines, columns, loaded)
        alone = engine_seconds(loaded.engine, trunks, settings.max_batch_tokens) if index % 2 else None
        started = now()
        job = Job(open_source(str(file)), folder / f"slice{index}.out.jsonl", columns, {})
        computed = Computed()
        with opened(job, computed) as writer:
            await score(writer, scorer)
        whole = since(started)
        alone = alone or engine_seconds(loaded.engine, trunks, settings.max_batch_tokens)
        found.append((whole, alone, computed.tokens))
        print(f"  slice {index}: CPU {whole[0]:.1f} s, engine alone {alone[0]:.1f} s", flush=True)
    await scorer.close()
    return found


def with_ray(file: Path, pair: Path, folder: Path) -> Json:
    """Rows that Ray Data lost or doubled, and the largest difference of a reward from the run without it."""
    some = folder / "some.jsonl"
    some.write_text("\n".join(file.read_text().splitlines()[:RAY_ROWS]) + "\n")
    columns = ",".join(f"{field}={column}" for field, column in GSM8K.items())
    models = (
        "--sft",
        str(pair / "sft"),
        "--reference",
        str(pair / "reference"),
        "--threads",
        "1",
        "--columns",
        columns,
    )
    rewards = {}
    for name, options in {"ray": ("--ray", "--ray-workers", "2"), "local": ()}.items():
        out = folder / f"{name}.jsonl"
        subprocess.run(command(some, out, *models, *options), check=True, stderr=subprocess.DEVNULL)
        rewards[name] = [json.loads(line) for line in out.open()]
    numbers = Counter(row["row"] for row in rewards["ray"])
    pairs = zip(rewards["ray"], rewards["local"], strict=True)
    worst = max(float(np.abs(np.array(a["reward"]) - np.array(b["reward"])).max(initial=0)) for a, b in pairs)
    assert worst < TOLERANCE_NATS, f"rewards differ by {worst} nats"
    return {
        "ray_rows": RAY_ROWS,
        "ray_workers": 2,
        "ray_rows_lost": sum(row not in numbers for row in range(RAY_ROWS)),
        "ray_rows_double": sum(count - 1 for count in numbers.values()),
        "ray_reward_difference": worst,
    }


if __name__ == "__main__":
    sys.exit(main())
