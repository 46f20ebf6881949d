"""A step that takes a while is reported while it runs; one that ends soon is not."""

from threading import Event

import pytest
from dense_reward.checkpoints import slow_step as module
from dense_reward.checkpoints.slow_step import slow_step


def test_a_slow_step_is_reported_before_it_ends_and_a_quick_one_never(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    with slow_step(lines.append, "loading a"):
        pass
    monkeypatch.setattr(module, "SILENT_S", 0.0)
    reported = Event()

    def report(line: str) -> None:
        lines.append(line)
        reported.set()

    with slow_step(report, "loading b"):
        assert reported.wait(60.0)
    assert lines == ["loading b ..."]
