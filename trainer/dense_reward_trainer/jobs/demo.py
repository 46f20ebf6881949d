"""`make demo`: trains a tiny pair, serves it, shows a right and a wrong answer as heatmaps, and keeps serving.

The demonstrations are two-digit sums. Novices, who forget the carry, wrote more of them than experts did, so the SFT
model finds the novices' wrong answers likelier; its reward does not. It trains and serves in separate processes, with
the commands that a user would type.
"""

import argparse
import base64
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from dense_reward import Client, ClientError, Scored, ScoreOptions
from dense_reward.schemas import SignalName

from dense_reward_trainer.data.arithmetic import worked_addition
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.runs.local_service import free_port, serving_run

RUN = Path("runs/demo")
PAIR = "base"
ADDENDS = (84, 39)
PORT = 8000
COMPARED = 100
SIGNALS: dict[SignalName, str] = {"reward": "reward", "sft_logprob": "log-prob of the SFT model"}
NEXT = (
    ("preview demo_preview", "would training on the reward help? A verdict from judged answers"),
    ("dpr demo_dpr", "train on it: greedy answers become right"),
    ("evaluate demo_evaluate", "how often base, SFT model and trained policy are right"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit code, 0 also after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="dense-reward-demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after showing the heatmaps")
    parser.add_argument(
        "--port", type=int, default=PORT, help="port of the service; another free port if this one is taken"
    )
    options = parser.parse_args(arguments)
    try:
        train_pair()
        port = free_port(options.port)
        _step(f"3/3  serving them at http://127.0.0.1:{port}, and scoring a right and a wrong answer")
        with serving_run(RUN, port) as (server, url):
            _show(url)
            print("\n".join(next_commands(port, serves=not options.once)), flush=True)
            if not options.once:
                print(f"\nThe two answers on the page: {url}/#{view()}\nCtrl-C stops the service.", flush=True)
                server.wait()
    except subprocess.CalledProcessError as error:
        print(f"demo: training failed: the reason is above. Remove {RUN} if it is of an earlier demo.", file=sys.stderr)
        return error.returncode
    except (ClientError, JobError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def train_pair() -> None:
    """Trains base and SFT model; keeps finished runs, resumes others. Raises CalledProcessError if one fails."""
    _step("1/3  training a base model from scratch on sums, 90 % of them by novices who forget the carry")
    _train("demo_base_sft")
    _step("2/3  SFT on better demonstrations: 60 % of them by novices, 40 % by experts")
    _train("demo_sft")


def _train(recipe: str) -> None:
    subprocess.run([sys.executable, "-m", "dense_reward_trainer.cli", "sft", recipe], check=True)


def answers(a: int, b: int) -> tuple[str, list[str]]:
    """A prompt with the answers of an expert and of a novice, who forgets the carry."""
    return f"Add {a} and {b}.", [worked_addition(a, b, 2), worked_addition(a, b, 2, forgets_carry=True)]


def example() -> tuple[str, list[str]]:
    """The prompt and the two answers that the demo shows. The prompt is held out."""
    return answers(*ADDENDS)


def view() -> str:
    """The fragment of the page's address that opens it with the example; http/web/link.js reads it."""
    prompt, responses = example()
    texts = [{"text": text, "thoughts": ""} for text in responses]
    shown = {"pair": PAIR, "input": {"mode": "prompt", "prompt": prompt, "responses": texts}, "choices": {}}
    packed = zlib.compress(json.dumps(shown).encode(), wbits=-zlib.MAX_WBITS)
    return f"v1={base64.urlsafe_b64encode(packed).decode().rstrip('=')}"


def next_commands(port: int, *, serves: bool) -> list[str]:
    """The lines at the end: what to try, and what must be done first."""
    own_port = f" service_url=http://127.0.0.1:{port}" if serves and port != PORT else ""
    commands = [f"dense-reward-train {job}{'' if job.startswith('preview') else own_port}" for job, _ in NEXT]
    width = max(map(len, commands))
    lines = [f"  {command:{width}}  # {what}" for command, (_, what) in zip(commands, NEXT, strict=True)]
    first = "in another terminal, after `. .venv/bin/activate`"
    first += "" if serves else f" and `dense-reward serve --run {RUN} &`"
    return ["", f"Try next, {first}:", *lines]


def _show(url: str) -> None:
    prompt, responses = example()
    items = [{"prompt": prompt, "responses": responses}]
    with Client(url) as client:
        print(_shown(client.heatmap(items, format="ansi", options=ScoreOptions(model=PAIR))))
        held_out = [answers(*addends) for addends in held_out_sums()]
        compared = [{"prompt": prompt, "responses": pair} for prompt, pair in held_out]
        print("\nResponse 1 is an expert's. Response 2 is a novice's, and wrong. Sums over the answer, in nats:")
        for signal, name in SIGNALS.items():
            options = ScoreOptions(model=PAIR, signal=signal)
            shown = client.score_items(items, options=options).results
            right = _right_first(client.score_items(compared, options=options))
            ranked = f"higher for the right answer to {right} of {len(compared)} held-out sums"
            print(f"  {name:27}{shown[0].sum:+.2f} and {shown[1].sum:+.2f}; {ranked}")


def held_out_sums() -> list[tuple[int, int]]:
    """The addends of the first held-out prompts."""
    prompts = [json.loads(line)["messages"][0]["content"] for line in (RUN / "held_out.jsonl").read_text().splitlines()]
    found = [re.findall(r"\d+", prompt) for prompt in prompts[:COMPARED]]
    return [(int(a), int(b)) for a, b in found]


def _right_first(scored: Scored) -> int:
    """In how many items the first response has the higher sum."""
    sums = [result.sum for result in scored.results]
    return sum(right > wrong for right, wrong in zip(sums[::2], sums[1::2], strict=True))


def _shown(heatmap: str) -> str:
    """With colours only on a terminal."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return heatmap if colour else re.sub(r"\x1b\[[0-9;]*m", "", heatmap)


def _step(text: str) -> None:
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
