"""Starts, pauses and measures the contestants' processes, and exchanges JSON lines with them on stdin and stdout.

Imports only numpy: vLLM's worker imports this module in an environment without the project's other dependencies.
A worker loads once and writes one line of facts; then it answers each Question with an Answer.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from bench.speed.workload import Item, read

Logprobs = NDArray[np.float32]  # [models, N], all response tokens in order
Score = Callable[[tuple[Item, ...]], Logprobs]
Facts = Mapping[str, object]
END_S = 20.0
CLEAR_PEAK = "5"  # see proc(5), clear_refs
KIB, MB = 1024, 1e6
DEVICE_POLL_S = 0.05


class ContestantError(Exception):
    """A contestant failed: the run ends."""


class NotMeasuredError(Exception):
    """A contestant cannot be measured here; the message is the reason. The run continues without it."""


class Question(TypedDict):
    """A request to a worker. Some workers use `method` and `batch`. Log-probs are written to `out`, a .npy file."""

    workload: str
    out: str
    method: str
    batch: int


class Answer(TypedDict, total=False):
    """Seconds of each request of the workload, the reason why there are none, or other facts."""

    latencies_s: list[float]
    error: str
    facts: dict[str, object]


def serve(start: Callable[[], tuple[Facts, Callable[[Question], Answer]]]) -> None:
    """Loads, then answers until stdin ends. Output of libraries goes to stderr: stdout is only for answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    facts, answer = start()
    answers.write(json.dumps({"facts": facts}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")


def timed(question: Question, score: Score) -> Answer:
    """Scores the requests of the workload one after another, and writes the log-probs."""
    latencies_s, logprobs = [], []
    for items in read(Path(question["workload"])).requests:
        started_s = time.perf_counter()
        logprobs.append(score(items))
        latencies_s.append(time.perf_counter() - started_s)
    np.save(question["out"], np.concatenate(logprobs, axis=1))
    return {"latencies_s": latencies_s}


class Group:
    """A running process and its children, in their own process group. A context manager that ends them."""

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str], pipes: bool = False
    ) -> None:
        """Starts in this process's folder. stderr goes to `log`, and stdout too unless `pipes`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else output,
                stderr=output,
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
            self.process.wait(END_S)
        self._signal(signal.SIGKILL)  # children that are still running
        self.process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets the processes run only within the block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def last_error(self) -> str:
        """Returns the last line of the log that names an error, else the last line; without this folder's path."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["its log is empty"])[-1].replace(str(Path.cwd()) + "/", "")

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Worker(Group):
    """A process that answers questions. Paused once it has loaded. Raises ContestantError if it cannot load."""

    def __init__(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
        super().__init__(command, log=log, environment=environment, pipes=True)
        try:
            self.facts: Facts = self._line()["facts"]
        except BaseException:
            self.__exit__()
            raise
        self.pause()

    def ask(self, question: Question) -> Answer:
        """Raises ContestantError if the worker ended, NotMeasuredError if it reports why it has no answer."""
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
            raise ContestantError(self.last_error())
        answer: Answer = json.loads(line)
        return answer


def _open(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise ValueError("the process was started without pipes")
    return pipe


@dataclass(slots=True)
class PeakMemory:
    """Highest memory within a block of `watched`, in megabytes of 10^6 bytes. Set when the block ends."""

    mb: float = 0.0


@contextmanager
def watched(pid: int, device: str) -> Iterator[PeakMemory]:
    """Measures the peak memory within the block: of the process on a CPU, else of the whole device."""
    peak = PeakMemory()
    if device == "cpu":
        Path(f"/proc/{pid}/clear_refs").write_text(CLEAR_PEAK)
        yield peak
        peak.mb = _status_mb(pid, "VmHWM")
        return
    over = threading.Event()
    thread = threading.Thread(target=_follow_device, args=(peak, over))
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def held_mb(pid: int, device: str) -> float:
    """Memory held now: by the process on a CPU, else on the whole device."""
    return _status_mb(pid, "VmRSS") if device == "cpu" else device_mb()


def device_mb() -> float:
    """Memory in use on the first GPU, by all processes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * KIB * KIB / MB


def machine_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _follow_device(peak: PeakMemory, over: threading.Event) -> None:
    while not over.wait(DEVICE_POLL_S):
        peak.mb = max(peak.mb, device_mb())


def _status_mb(pid: int, name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines[name].split()[0]) * KIB / MB
