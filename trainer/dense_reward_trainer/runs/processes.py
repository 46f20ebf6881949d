"""Processes of a job: tasks in parallel, the end by SIGTERM, and what only one process of a torchrun does."""

import atexit
import ctypes
import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn, TypeVar

from dense_reward.records import Result

Task = TypeVar("Task")
TERMINATED = 128 + signal.SIGTERM
TERMINATE_AGAIN_S = 10.0
PR_SET_PDEATHSIG = 1


def exit_on_sigterm() -> None:
    """On SIGTERM, exit by SystemExit: `finally` and `with` blocks run, and stop the processes that they started."""
    signal.signal(signal.SIGTERM, _exit)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """`exit_on_sigterm` within the block; the previous handler is restored after it."""
    before = signal.getsignal(signal.SIGTERM)
    exit_on_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exits_with(main: Callable[[], int]) -> NoReturn:
    """Exit with the code that `main` returns.

    A process of a torchrun or accelerate launch ends after its exit handlers, without finalising the interpreter:
    gloo's threads free tensors of finished operations late, which needs the interpreter, and the process would be
    aborted now and then (SIGABRT, "terminate called without an active exception"), also after destroy_process_group().
    """
    code: object = 1

    def end() -> None:
        if "RANK" in os.environ:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    atexit.register(end)  # before the exit handlers of all that `main` imports, so it runs after them
    try:
        code = main()
    except SystemExit as exit_:
        code = exit_.code or 0
        raise
    sys.exit(code)


def end_with_parent() -> None:
    """Let the kernel send this process SIGTERM when the one that started it ends, even by SIGKILL. Only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def started(process: BaseProcess) -> Iterator[None]:
    """A process that is terminated if the block ends before it does."""
    process.start()
    try:
        yield
    finally:
        while process.is_alive():  # again and again: a signal that comes during the process's start can get lost
            process.terminate()
            process.join(TERMINATE_AGAIN_S)


def is_first_process(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the only process of a job, or the first one of a torchrun or accelerate launch."""
    return variables.get("RANK", "0") == "0"


def is_first_to_say(text: str, variables: Mapping[str, str] = os.environ) -> bool:
    """Whether no other process of this torchrun or accelerate launch on this machine has said `text`.

    All of them find an error in the configuration, but one line is enough; what only one of them finds is never lost.
    """
    own_file = variables.get("TORCHELASTIC_ERROR_FILE")
    if not own_file:
        return True
    folder_of_all = Path(own_file).parent.parent
    try:
        (folder_of_all / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def silent(_: str) -> None:
    """Report of all processes except the first: with torchrun, only one process reports."""


def in_processes(processes: int, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """Results of a module-level function for all tasks, in the order of completion.

    The first error ends the other processes too; so does closing the iterator early.
    """
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _prepare_worker) as pool:
        futures = [pool.submit(_run_task, function, task) for task in tasks]
        try:
            for done in as_completed(futures):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while left := multiprocessing.active_children():
                for process in left:
                    process.terminate()
                for process in left:
                    process.join(TERMINATE_AGAIN_S)
            raise


def _prepare_worker() -> None:
    exit_on_sigterm()
    end_with_parent()


def _run_task(function: Callable[[Task], Result], task: Task) -> Result:
    """Runs a task. On SystemExit it ends the worker: the pool would treat it as a failed task and start the next."""
    try:
        return function(task)
    except SystemExit:
        os._exit(TERMINATED)


def _exit(signal_number: int, frame: object) -> None:
    sys.exit(TERMINATED)
