"""Writes a file in ProcessBench's format from right answers: every other one gets a planted first error, a wrong digit.

python examples/process_bench_file.py runs/additions/held_out.jsonl planted.jsonl

Steps are lines: step_separator="\\n".
"""

import json
import random
import sys
from pathlib import Path

from dense_reward_trainer.data.corruption import digit_corruption
from dense_reward_trainer.data.sources import DataSource, load

source, out = sys.argv[1:3]
rng, rows = random.Random(0), []
for number, demonstration in enumerate(load(DataSource(source=source)).demonstrations):
    steps, label = demonstration.response.split("\n"), -1
    with_digit = [index for index, step in enumerate(steps) if any(character.isdigit() for character in step)]
    if number % 2 and with_digit:
        label = rng.choice(with_digit)
        steps[label] = digit_corruption(steps[label], rng).text
    problem = demonstration.messages[-2].content
    rows.append({"id": f"planted-{number}", "problem": problem, "steps": steps, "label": label})
Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
