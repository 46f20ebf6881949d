"""SIGTERM to the real process while a part of it hangs for ever: it ends all the same, as `make hostile` measures."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.hostile import signals
from bench.hostile.signals import PARTS, SERVE, busy, hung_up, idle_tls

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _short_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "DRAIN_S", 1)


# The drain of a held interpreter or a log that is never read cannot be finished, so the process is ended from outside.
@pytest.mark.parametrize(("part", "code"), list(zip(PARTS, (0, 0, 0, 1, 1), strict=True)))
def test_a_service_a_part_of_which_hangs_ends_when_its_drain_is_over(part: str, code: int) -> None:
    assert busy(part, twice=False).code == code


@pytest.mark.parametrize("part", ["device", "log"])
def test_a_second_signal_ends_it_whatever_hangs(part: str) -> None:
    assert busy(part, twice=True).code == 128 + signal.SIGTERM


def test_sighup_drains_as_sigterm_does() -> None:
    assert hung_up().code == 0


def test_an_idle_tls_connection_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "DRAIN_S", 20)
    assert idle_tls(twice=False).after_s < 20, "its drain ends with its last connection"


@pytest.mark.parametrize(("command", "code"), [("serve", 0), ("adopt", 128 + signal.SIGTERM)])
def test_sigterm_is_handled_before_the_slow_imports(command: str, code: int, tmp_path: Path) -> None:
    """Process 1 ignores what it does not handle; other processes would show it by the code -SIGTERM."""
    (tmp_path / "dense_reward").mkdir()
    importing = "import time; print('importing', flush=True); time.sleep(60)"
    (tmp_path / "dense_reward" / "__init__.py").write_text(importing)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {SERVE}"
    with subprocess.Popen([sys.executable, "-c", program, command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code
