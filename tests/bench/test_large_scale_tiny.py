"""The study of docs/large_scale.md at the size of a CPU: the page's commands are those that made its figures."""

from pathlib import Path

from bench.studies.large_scale_tiny import jobs, overrides

PAGE = Path("docs/large_scale.md")


def test_the_page_has_the_commands_that_made_its_figures() -> None:
    file = "gsm8k_train.jsonl"
    lines = [line.replace("'", "") for line in PAGE.read_text().splitlines()]
    for arguments in (*jobs(file), ("sweep", "large_scale_sweep_tiny", *overrides(file))):
        assert " ".join(["dense-reward-train", *arguments]) in lines
