"""`make demo`: train a tiny pair, serve it, show a right and a corrupted answer as heatmaps, and keep serving.

Each step is the command that a user would type, in a process of its own.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dense_reward import Client, ClientError

from dense_reward_trainer.arithmetic import worked

RUN = Path("runs/demo")
PAIR = ("--sft", str(RUN / "checkpoints" / "sft"), "--reference", str(RUN / "checkpoints" / "reference"))
ADDENDS = (478, 365)
RIGHT, WRONG = "8+5=13", "8+5=15"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 once everything was shown and, without --once, serving was ended by Ctrl-C."""
    parser = argparse.ArgumentParser(prog="dense-reward-demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after showing the heatmaps")
    parser.add_argument("--port", type=int, default=8000, help="port of the service; a free one if it is taken")
    options = parser.parse_args(arguments)
    try:
        _step("1/3  training a pair from scratch on worked additions (a run that is there already is taken as it is)")
        _run(["-m", "dense_reward_trainer.cli", "sft", "arithmetic_sft"])
        port = _free_port(options.port)
        _step(f"2/3  serving it at http://127.0.0.1:{port}")
        with _serving(port) as (server, url):
            _step("3/3  scoring a right and a corrupted answer")
            _show(url)
            if not options.once:
                _keep_serving(server, url)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ClientError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


@contextmanager
def _serving(port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The service in a process of its own, ready; stopped at the end."""
    command = [sys.executable, "-m", "dense_reward.cli", "serve", *PAIR, "--port", str(port), "--log-level", "warning"]
    url = f"http://127.0.0.1:{port}"
    # the bar of loading 4 MB of weights would only stand in the way here
    with subprocess.Popen(command, env={**os.environ, "TQDM_DISABLE": "1"}) as server:
        try:
            with Client(url) as client:
                client.wait_until_ready(120.0)
            yield server, url
        finally:
            server.terminate()


def _show(url: str) -> None:
    first, second = ADDENDS
    right = worked(first, second, 3)
    prompt, responses = f"Add {first} and {second}.", [right, right.replace(RIGHT, WRONG, 1)]
    with Client(url) as client:
        print(client.heatmap([{"prompt": prompt, "responses": responses}], format="ansi"))
        scored = client.score(prompt=prompt, responses=responses)
    for name, result in zip(
        (f"response 1 is right ({RIGHT})", f"response 2 is not ({WRONG})"), scored.results, strict=True
    ):
        print(f"{name}: its rewards sum to {result.sum:+.2f} nats")


def _keep_serving(server: subprocess.Popen[bytes], url: str) -> None:
    print(f"\nThe page: {url}/   API: {url}/docs   Ctrl-C ends the service.")
    server.wait()


def _run(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


def _free_port(wanted: int) -> int:
    """The port that was asked for, or a free one where it is taken."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


def _step(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
