"""The service stopped: by SIGTERM under full load, and killed under a DPR job and started again."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2

from bench.reliability.load import Json, Known, Outcome, ask_until_it_stops, client_of, requests, with_answers
from bench.reliability.server import PAIR, Server, serving

STOPS, CONCURRENCY, DRAIN_S = 20, 24, 30
STEPS, KILLS, AWAY_S = 40, 4, 3.0
RECIPE = "arithmetic_dpr"


def measure_sigterm() -> tuple[Json, Json]:
    """SIGTERM at random times: counts unanswered admitted requests, wrong answers and exit codes other than 0."""
    draw = random.Random(0)
    with serving() as server:
        known = asyncio.run(with_answers(server, requests(100)))
    runs = [asyncio.run(_stopped(known, draw.uniform(0.2, 2.0))) for _ in range(STOPS)]
    codes = [run["exit_code"] for run in runs]
    seconds = [run["seconds"] for run in runs]
    unanswered = sum(int(str(run["unanswered"])) for run in runs) + sum(code != 0 for code in codes)
    wrong = sum(int(str(run["wrong"])) for run in runs)
    details: Json = {"exit_codes": codes, "seconds": seconds, "wrong": wrong, "runs": runs}
    return {"sigterm_unanswered": unanswered + wrong}, details


async def _stopped(known: list[Known], after_s: float) -> Json:
    server = Server.start("--drain-s", str(DRAIN_S))
    await asyncio.to_thread(server.wait_until_ready)
    outcome, over = Outcome(), asyncio.Event()

    async def keep_asking(client: httpx2.AsyncClient, draw: random.Random) -> None:
        while not over.is_set() and await ask_until_it_stops(client, draw.choice(known), outcome):
            pass

    async with client_of(server) as client:
        callers = [asyncio.create_task(keep_asking(client, random.Random(at))) for at in range(CONCURRENCY)]
        await asyncio.sleep(after_s)
        before = time.perf_counter()
        code = await asyncio.to_thread(server.stop)
        seconds = time.perf_counter() - before
        over.set()
        await asyncio.gather(*callers)
    outcome.check()
    return {"after_s": after_s, "seconds": seconds, "exit_code": code, "unanswered": outcome.lost, **outcome.summary()}


def measure_dpr_kill() -> tuple[Json, Json]:
    """Kills under a DPR job: counts lost steps, and compares scored tokens and weights with an undisturbed job."""
    with tempfile.TemporaryDirectory() as name:
        calm, killed = Path(name) / "calm", Path(name) / "killed"
        _run_job(calm, kills=0)
        kills = _run_job(killed, kills=KILLS)
        expected, found = _steps(calm), _steps(killed)
        same = [_weights(folder) for folder in (calm, killed)]
    scored = [sum(steps.values()) for steps in (expected, found)]
    lost = len(set(range(1, STEPS + 1)) - set(found))
    details: Json = {
        "steps": STEPS,
        "kills": kills,
        "scored_tokens": {"undisturbed": scored[0], "killed": scored[1]},
        "same_policy_to_the_bit": same[0] == same[1],
    }
    return {"dpr_steps_lost": lost + (scored[0] != scored[1])}, details


def _run_job(folder: Path, kills: int) -> int:
    """Runs a job to its end, and kills and restarts the service meanwhile. Returns how often it was killed."""
    draw = random.Random(0)
    server = Server.start("--reference", str(PAIR / "early"), "--deterministic")
    port = int(server.url.rpartition(":")[2])
    server.wait_until_ready()
    changes = [f"output_dir={folder}", f"service_url={server.url}", f"steps={STEPS}", "threads=1"]
    changes += ["service_pair=null", "evaluate_every=1000", "held_out_options.limit=8"]
    command = [sys.executable, "-m", "dense_reward_trainer.cli", "dpr", RECIPE, *changes]
    done = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while job.poll() is None:
            time.sleep(0.05)
            if done < kills and len(_steps(folder)) > (done + draw.random()) * STEPS / (kills + 1) + 1:
                server.stop(signal.SIGKILL)
                time.sleep(AWAY_S)
                server = Server.start("--reference", str(PAIR / "early"), "--deterministic", port=port)
                done += 1
        code = job.returncode
    server.stop(signal.SIGKILL)
    if code != 0:
        raise RuntimeError(f"the job ended with exit code {code}, expected 0")
    return done


def _steps(folder: Path) -> dict[int, float]:
    """Scored tokens by step. Raises RuntimeError if a step occurs twice."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    rows = [row for row in map(json.loads, lines) if "scored_tokens" in row]
    steps = {int(row["step"]): float(row["scored_tokens"]) for row in rows}
    if len(steps) < len(rows):
        raise RuntimeError(f"{file} holds a step twice")
    return steps


def _weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / "policy" / "model.safetensors").read_bytes()
