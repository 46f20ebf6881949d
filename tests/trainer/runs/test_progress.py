"""The progress line: how far a job is, tokens per second of this start, the figures of the moment."""

import io
import re
import sys

import pytest
from dense_reward_trainer.runs.progress import Progress


class Clock:
    """A clock that a test sets, in seconds."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def last_line(captured: str) -> str:
    return re.split("[\r\n]", captured.rstrip())[-1]


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def as_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """stderr as it is on a terminal. No fixture: pytest's capture takes stderr back before the test is called."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    return found


def test_the_line_has_the_step_the_pace_the_time_left_and_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = as_terminal(monkeypatch)
    clock = Clock()
    with Progress(8, "steps", done=2, clock=clock) as progress:
        for _ in range(3):
            clock.now_s += 2.0
            progress.advance(tokens=500, note="loss 0.412")
    line = last_line(terminal.getvalue())
    assert re.match(r"5/8 steps \|.*\| [0-9:?]+ left, 250 tokens/s, loss 0\.412", line), line


def test_tokens_of_an_earlier_start_do_not_count_and_without_tokens_there_is_no_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = as_terminal(monkeypatch)
    with Progress(4, "prompts", done=3) as progress:
        progress.advance()
    assert last_line(terminal.getvalue()).startswith("4/4 prompts |")
    with Progress(4, "prompts") as progress:
        progress.advance(note="kl 0.1")
    line = last_line(terminal.getvalue())
    assert "tokens/s" not in line
    assert line.endswith("left, kl 0.1")


def test_a_file_gets_few_lines_without_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10_000, "steps") as progress:
        for _ in range(10_000):
            progress.advance(tokens=1)
    written = capsys.readouterr().err
    assert 1 <= written.count("\n") < 20
    assert not set("\r|█") & set(written)
    lines = written.splitlines()
    assert lines[-1].startswith("10000/10000 steps, ")
    assert len({*lines}) == len(lines), "each state once"


def test_reports_stand_on_their_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = as_terminal(monkeypatch)

    def report(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    with Progress(2, "steps") as progress:
        progress.beside(report)("milestone: reference")
        progress.advance(2)
    lines = re.split("[\r\n]", terminal.getvalue())
    assert "milestone: reference" in lines
