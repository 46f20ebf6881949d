"""The service killed under a DPR job and started again, several times: no step is lost, no sample counted twice."""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.reliability.load import Json
from bench.reliability.server import PAIR, Server

STEPS, KILLS, AWAY_S = 40, 4, 3.0
RECIPE = "arithmetic_dpr"


def measure() -> tuple[Json, Json]:
    with tempfile.TemporaryDirectory() as name:
        calm, killed = Path(name) / "calm", Path(name) / "killed"
        _run(calm, kills=0)
        kills = _run(killed, kills=KILLS)
        expected, found = _steps(calm), _steps(killed)
        same = [_weights(folder) for folder in (calm, killed)]
    scored = [sum(steps.values()) for steps in (expected, found)]
    lost = len(set(range(1, STEPS + 1)) - set(found))
    behind: Json = {
        "steps": STEPS,
        "kills": kills,
        "scored_tokens": {"undisturbed": scored[0], "killed": scored[1]},
        "same_policy_to_the_bit": same[0] == same[1],
    }
    return {"dpr_steps_lost": lost + (scored[0] != scored[1])}, behind


def _run(folder: Path, kills: int) -> int:
    """A job to its end, the service killed so many times meanwhile; how often it was."""
    draw = random.Random(0)
    server = Server.start("--reference", str(PAIR / "early"), "--deterministic")
    port = int(server.url.rpartition(":")[2])
    server.wait_until_ready()
    changes = [f"output_dir={folder}", f"service_url={server.url}", f"steps={STEPS}", "threads=1"]
    changes += ["evaluate_every=1000", "held_out_options.limit=8"]
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
        raise RuntimeError(f"the job ended with code {code}")
    return done


def _steps(folder: Path) -> dict[int, float]:
    """Scored tokens by step. Raises RuntimeError where a step is there twice."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    rows = [row for row in map(json.loads, lines) if "scored_tokens" in row]
    steps = {int(row["step"]): float(row["scored_tokens"]) for row in rows}
    if len(steps) < len(rows):
        raise RuntimeError("a step is there twice")
    return steps


def _weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / "policy" / "model.safetensors").read_bytes()
