"""The last line of a job: what is finished, and the next command, quoted for a shell."""

import shlex
from pathlib import Path

from dense_reward_trainer.runs.next_step import finished, job, serve


def test_the_line_has_the_result_and_the_next_command() -> None:
    assert finished(Path("runs/a"), serve(Path("runs/a"), ["base"])) == (
        "finished: runs/a; next: dense-reward serve --run runs/a"
    )
    assert finished(Path("runs/a")) == "finished: runs/a"


def test_a_run_without_a_reference_is_served_with_one_that_the_user_names() -> None:
    assert serve(Path("runs/a"), ()) == (
        "dense-reward serve --sft runs/a/checkpoints/sft --reference EARLIER_CHECKPOINT"
    )


def test_paths_with_spaces_and_mappings_are_one_word_each() -> None:
    words = shlex.split(job("evaluate", policies="{start: my runs/a, dpr: b}", output_dir=Path("my runs/e")))
    assert words == [
        "dense-reward-train", "evaluate", "CONFIG", "policies={start: my runs/a, dpr: b}", "output_dir=my runs/e",
    ]  # fmt: skip
    assert shlex.split(serve(Path("my runs"), ["base"]))[-1] == "my runs"
