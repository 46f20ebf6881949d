"""The names that users and their programs depend on, but those of HTTP: command lines, environment, metrics.

docs/openapi.json has those of HTTP. `python tests/support/public_surface.py` prints them as JSON. It only runs
commands, so it can also describe another checkout: put the service/ and trainer/ of that one in PYTHONPATH.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

SERVICE, TRAINER = "dense_reward.cli", "dense_reward_trainer.cli"
COMMANDS = {SERVICE: ("", "serve", "check", "adopt"), TRAINER: ("",)}
PATIENCE_S = 120.0

Json = dict[str, "Json"] | list["Json"] | str | float | bool | None


def public_surface() -> dict[str, Json]:
    """Everything by kind, sorted, so that two of them can be compared line by line."""
    helps = {
        f"{module} {command}".strip(): help_of(module, command) for module in COMMANDS for command in COMMANDS[module]
    }
    jobs = sorted(set(re.findall(r"^    ([a-z]+)\b", helps[TRAINER], re.MULTILINE)))
    helps |= {f"{TRAINER} {job}": help_of(TRAINER, job) for job in jobs}
    return {
        "flags": {command: [*sorted(set(re.findall(r"--[a-z][a-z-]+", text)))] for command, text in helps.items()},
        "jobs": [*jobs],
        "environment": [*sorted(set(re.findall(r"DENSE_REWARD_[A-Z_]+", helps[f"{SERVICE} serve"])))],
        "metrics": [*sorted(re.findall(r"^# TYPE (.+)$", served_metrics(), re.MULTILINE))],
    }


def help_of(module: str, command: str) -> str:
    """The output of `--help` without its examples, unwrapped: argparse breaks lines also at hyphens."""
    environment = {**os.environ, "COLUMNS": "10000"}
    arguments = [sys.executable, "-m", module, *command.split(), "--help"]
    shown = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
    return shown.partition("\nexamples:\n")[0]


def served_metrics() -> str:
    """The metrics of a running service."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", SERVICE, "serve", "--engine", "fake", "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(command) as server:
        try:
            deadline_s = time.monotonic() + PATIENCE_S
            while True:
                try:
                    read(port, "/health")  # some metrics exist only once a request was answered
                    return read(port, "/metrics")
                except OSError:
                    if server.poll() is not None or time.monotonic() > deadline_s:
                        raise
                    time.sleep(0.1)
        finally:
            server.terminate()


def read(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
        text: str = answer.read().decode()
    return text


if __name__ == "__main__":
    text = json.dumps(public_surface(), indent=1)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")
    else:
        sys.stdout.write(text + "\n")
