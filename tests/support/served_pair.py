"""A tiny pair on disk, as the trainer writes it, and the real service in a separate process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from dense_reward import Backoff, Client
from dense_reward.checkpoints.probe import probe_of_texts
from dense_reward.checkpoints.write_manifest import ManifestFacts
from dense_reward.manifest import Role
from dense_reward_trainer.configs.sft import ScratchOptions
from dense_reward_trainer.data.sources import DataSource, load, split
from dense_reward_trainer.runs.checkpoint import write_checkpoint
from dense_reward_trainer.sft.from_scratch import random_model, train_tokenizer

DATA: Mapping[str, object] = {
    "source": "arithmetic",
    "held_out_fraction": 0.25,
    "arithmetic": {"demonstrations": 24, "digits": 2},
}
SIZES = ScratchOptions(
    vocabulary=280,
    hidden_size=16,
    layers=2,
    heads=2,
    intermediate_size=32,
    max_position_embeddings=96,
    tie_embeddings=False,
)


def write_pair(folder: Path, vocab_size: int = SIZES.vocabulary, sizes: ScratchOptions = SIZES) -> None:
    """Writes sft, reference, early and held_out.jsonl; weights are random and enlarged; some samples end their turn."""
    source = DataSource.model_validate(DATA)
    parts = split(load(source).demonstrations, source.held_out_fraction, source.seed)
    tokenizer = train_tokenizer([d.messages[0].content + d.response for d in parts.train], vocab_size)
    roles: list[tuple[str, Role, int]] = [("sft", "sft", 20), ("reference", "reference", 10), ("early", "reference", 2)]
    for name, role, step in roles:
        model = random_model(sizes, tokenizer, seed=step)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(10.0)
            model.lm_head.weight[tokenizer.eos_token_id] *= 2.0
        facts = ManifestFacts(role=role, run_id="tiny", renderer="plain", optimiser_step=step)
        write_checkpoint(folder / name, model, tokenizer, facts, probe_of_texts)
    lines = [
        {"messages": [{"role": m.role, "content": m.content} for m in d.messages], "final_answer": d.answer}
        for d in parts.held_out
    ]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment() -> dict[str, str]:
    """Environment of child processes: one thread, so that the order of sums is always the same."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(slots=True)
class ServedPair:
    """A pair behind `dense-reward serve`, which can be killed and started again on its port.

    `pairs_file`: serve the pairs of this file instead.
    """

    folder: Path
    port: int
    pairs_file: Path | None = None
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        pair = ["--sft", str(self.folder / "sft"), "--reference", str(self.folder / "reference")]
        if self.pairs_file is not None:
            pair = ["--pairs-file", str(self.pairs_file)]
        command = [sys.executable, "-m", "dense_reward.cli", "serve", *pair, "--port", str(self.port), "--threads", "1"]
        with (self.folder / "service.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)

    def wait_until_ready(self) -> None:
        with Client(self.url, backoff=Backoff(0.1, 0.2)) as client:
            client.wait_until_ready(60)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
