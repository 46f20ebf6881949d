"""Writes the held-out demonstrations, on which later jobs evaluate, as a data source in the `messages` format."""

import json
from collections.abc import Iterable
from pathlib import Path

from dense_reward.checkpoints.atomic_file import write_whole

from dense_reward_trainer.data.records import Demonstration


def write_held_out(path: Path, demonstrations: Iterable[Demonstration]) -> None:
    """Writes the file, completely or not at all."""
    lines = [
        json.dumps(
            {
                "messages": [message.as_mapping() for message in demonstration.messages],
                "final_answer": demonstration.answer,
                **({"tools": demonstration.tools} if demonstration.tools else {}),
            },
            ensure_ascii=False,
        )
        for demonstration in demonstrations
    ]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
