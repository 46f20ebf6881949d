"""`make demo`: trains a tiny pair, serves it, shows a right and a corrupted answer as heatmaps, and keeps serving.

It trains and serves in separate processes, with the commands that a user would type.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dense_reward import Client, ClientError

from dense_reward_trainer.data.arithmetic import worked_addition
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.runs.local_service import free_port, serving

CHECKPOINTS = Path("runs/demo/checkpoints")
ADDENDS = (478, 365)
RIGHT, WRONG = "8+5=13", "8+5=15"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit code, 0 also after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="dense-reward-demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after showing the heatmaps")
    parser.add_argument(
        "--port", type=int, default=8000, help="port of the service; another free port if this one is taken"
    )
    options = parser.parse_args(arguments)
    try:
        train_pair()
        port = free_port(options.port)
        _step(f"2/3  serving it at http://127.0.0.1:{port}")
        with serving(CHECKPOINTS / "sft", CHECKPOINTS / "reference", port) as (server, url):
            _step("3/3  scoring a right and a corrupted answer")
            _show(url)
            if not options.once:
                print(f"\nThe page: {url}/   API: {url}/docs   Ctrl-C stops the service.", flush=True)
                server.wait()
    except subprocess.CalledProcessError as error:
        return error.returncode
    except (ClientError, JobError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def train_pair() -> None:
    """Trains the pair; keeps a finished run, resumes an unfinished one. Raises CalledProcessError if it fails."""
    _step("1/3  training a pair from scratch on worked additions (a finished run is kept)")
    subprocess.run([sys.executable, "-m", "dense_reward_trainer.cli", "sft", "arithmetic_sft"], check=True)


def example() -> tuple[str, list[str]]:
    """A prompt and two responses: the right one, and the same with one digit corrupted."""
    right = worked_addition(*ADDENDS, 3)
    return f"Add {ADDENDS[0]} and {ADDENDS[1]}.", [right, right.replace(RIGHT, WRONG, 1)]


def _shown(heatmap: str) -> str:
    """With colours only on a terminal."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return heatmap if colour else re.sub(r"\x1b\[[0-9;]*m", "", heatmap)


def _show(url: str) -> None:
    prompt, responses = example()
    with Client(url) as client:
        print(_shown(client.heatmap([{"prompt": prompt, "responses": responses}], format="ansi")))
        scored = client.score(prompt=prompt, responses=responses)
    names = f"response 1 is right ({RIGHT})", f"response 2 is not ({WRONG})"
    for name, result in zip(names, scored.results, strict=True):
        print(f"{name}: its rewards sum to {result.sum:+.2f} nats")


def _step(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
