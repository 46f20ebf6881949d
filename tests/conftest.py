"""Rules for every test: no network, quiet libraries, and a reason for each skipped test of a GPU or vLLM."""

import os

# Set before anything imports transformers, datasets or torch: they read these variables once.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# The models are tiny: threads cost more than they save, and far more if other processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if not any(Path("/dev").glob("nvidia*")):
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU its kernels run in Python; read when a kernel is defined

NO_VLLM = "needs vLLM, which is not installed here: make test-vllm"
NO_CUDA = "needs a CUDA device, and torch.cuda.is_available() is False"


@pytest.fixture(autouse=True)
def _signal_handlers_are_restored() -> Iterator[None]:
    """A handler that a test does not remove would handle signals for pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    left = {number.name for number, handler in before.items() if signal.getsignal(number) is not handler}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert not left, f"the test left its own handler of {', '.join(left)}"


@pytest.fixture(autouse=True)
def _logging_is_restored() -> Iterator[None]:
    """A command that runs in this process logs to its standard error, which is closed once the test ends."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [found for found in root.handlers if type(found) is logging.StreamHandler and found not in before]:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _steps_are_silent_on_slow_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command says about a step that takes seconds is not in the way of a test on a busy machine."""
    monkeypatch.setattr("dense_reward.checkpoints.slow_step.SILENT_S", 3600.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason=NO_VLLM))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not cuda_is_there():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=NO_CUDA))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    skipped = sum("gpu" in getattr(report, "keywords", ()) for report in reports)  # a skipped file has none
    if skipped:
        terminalreporter.write_line(f"GPU tests not run: {skipped} ({NO_CUDA})", yellow=True)


def cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()
