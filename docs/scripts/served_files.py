"""A folder as a user of the documents has it: a served run, checkpoints of another trainer, and the two commands.

The commands are the real ones, but `dense-reward serve` ends as soon as it is ready, by SIGTERM.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dense_reward import Client
from dense_reward.checkpoints.adopt import adopt
from dense_reward.manifest import Role
from served_pair import SIZES, environment, free_port, write_pair

from docs.scripts.blocks import ROOT

ROLES: dict[str, Role] = {"sft": "sft", "reference": "reference", "early": "reference"}
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COMMAND = '#!/bin/sh\nexec {python} -m {module} "$@"\n'
CURL = '#!/bin/sh\nexec {curl} --fail-with-body "$@"\n'
SERVICE = """#!/bin/sh
[ "$1" = serve ] && exec {python} -m docs.scripts.serve_once "$@"
exec {python} -m dense_reward.cli "$@"
"""


@contextmanager
def user_folder(folder: Path) -> Iterator[str]:
    """Fills the folder, and serves its run. The value is the URL of the service."""
    write_checkpoints(folder)
    write_commands(folder / "bin")
    port = free_port()
    command = [sys.executable, "-m", "dense_reward.cli", "serve", "--run", "runs/demo", "--port", str(port)]
    with (folder / "service.log").open("wb") as log:
        service = subprocess.Popen([*command, "--threads", "1"], cwd=folder, env=environment(), stdout=log, stderr=log)
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            client.wait_until_ready(120)
        yield f"http://127.0.0.1:{port}"
    finally:
        service.terminate()
        service.wait()


def write_checkpoints(folder: Path) -> None:
    """Random weights: a run that the trainer wrote, and one of another trainer, whose folders have no manifests."""
    write_pair(folder / "made", sizes=SIZES.model_copy(update={"max_position_embeddings": 1024}))
    for place in ROLES:
        (folder / "made" / place / "manifest.json").unlink()
        (folder / "made" / place / "chat_template.jinja").write_text(TEMPLATE)
    for run in ("demo", "mine"):
        for place, role in ROLES.items():
            copy = folder / "runs" / run / "checkpoints" / place
            shutil.copytree(folder / "made" / place, copy)
            adopt(str(copy), role=role, run_id=run, report=lambda _: None)
        shutil.copy(folder / "made" / "held_out.jsonl", folder / "runs" / run)
    shutil.copytree(folder / "made" / "sft", folder / "trl_run" / "final")
    shutil.copytree(folder / "made" / "early", folder / "trl_run" / "checkpoint-50")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "constraints").symlink_to(ROOT / "constraints")


def write_commands(folder: Path) -> None:
    folder.mkdir()
    texts = {
        "dense-reward": SERVICE.format(python=sys.executable),
        "dense-reward-train": COMMAND.format(python=sys.executable, module="dense_reward_trainer.cli"),
        "curl": CURL.format(curl=shutil.which("curl")),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def user_environment(folder: Path) -> dict[str, str]:
    """The environment of a block of commands: the folder's commands come first."""
    return environment() | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
