"""Contestants' processes: each in a group of its own, which is stopped while another one is measured."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Self

from bench.speed.protocol import Answer, Facts, Question

PATIENCE_S = 20.0


class ContestantError(Exception):
    """A contestant broke: the run ends."""


class NotMeasuredError(Exception):
    """A contestant cannot be measured here, and why: the run goes on without it."""


class Group:
    """A process and its children, running. A context manager that ends them."""

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str], pipes: bool = False
    ) -> None:
        """Runs in this process's folder; what it says is in `log`, but for stdout where there are `pipes`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as said:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else said,
                stderr=said,
                env={**os.environ, **environment},
                start_new_session=True,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_S)
        self._signal(signal.SIGKILL)  # children that outlived it
        self.process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Runs within the block alone."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def last_words(self) -> str:
        """The line of its log that names an error, or else the last one; without paths of this machine."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it said nothing"])[-1].replace(str(Path.cwd()) + "/", "")

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Worker(Group):
    """A process that speaks the protocol. Paused once it has loaded. Raises ContestantError where it cannot."""

    def __init__(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
        super().__init__(command, log=log, environment=environment, pipes=True)
        try:
            self.facts: Facts = self._line()["facts"]
        except BaseException:
            self.__exit__()
            raise
        self.pause()

    def ask(self, question: Question) -> Answer:
        """Raises ContestantError where the worker ended, NotMeasuredError where it says why it has no answer."""
        pipe = _open(self.process.stdin)
        pipe.write(json.dumps(question) + "\n")
        pipe.flush()
        answer = self._line()
        if "error" in answer:
            raise NotMeasuredError(answer["error"])
        return answer

    def _line(self) -> Answer:
        line = _open(self.process.stdout).readline()
        if not line:
            self.process.wait()
            raise ContestantError(self.last_words())
        answer: Answer = json.loads(line)
        return answer


def _open(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise ValueError("the process was started without pipes")
    return pipe
