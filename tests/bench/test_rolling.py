"""Which requests count as failed in `make rolling`, and that haproxy accepts the shipped configuration."""

import shutil
import subprocess
from pathlib import Path

import pytest
from dense_reward_trainer.runs.local_service import free_port
from running_service import wait_until

from bench import rolling
from bench.rolling import CONFIGURATION, Load, Replacement, configured, figures, proxy

ROOT = Path(__file__).resolve().parents[2]

SHIPPED = (ROOT / CONFIGURATION).read_text("utf-8")
needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")


def checked_by_proxy(file: Path) -> tuple[int, str]:
    done = subprocess.run(["haproxy", "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@needs_haproxy
def test_the_proxy_takes_what_is_shipped_and_what_is_measured(tmp_path: Path) -> None:
    measured = tmp_path / "haproxy.cfg"
    measured.write_text(configured(SHIPPED, 8000, [8001, 8002]))
    for file in (ROOT / CONFIGURATION, measured):
        code, output = checked_by_proxy(file)
        assert code == 0, output
        assert "warning" not in output.lower()


def test_only_addresses_differ_between_what_is_shipped_and_what_is_measured() -> None:
    text = configured(SHIPPED, 8123, [8001, 8002])
    assert text.count("server replica0 127.0.0.1:8001\n    server replica1 127.0.0.1:8002\n") == 2
    assert "bind 127.0.0.1:8123\n" in text
    assert "resolvers" not in text
    kept = [line for line in SHIPPED.splitlines() if line.split()[:1] not in ([], ["bind"], ["server-template"])]
    gone = [line for line in kept if line not in text.splitlines()]
    resolvers = ["parse-resolv-conf", "accepted_payload_size 8192", "hold valid 2s"]
    assert [line.strip() for line in gone] == ["resolvers replicas", *resolvers]


def test_as_the_chart_nothing_is_tried_again() -> None:
    text = configured(SHIPPED, 8123, [8001], retries=False)
    assert "    retries 0\n" in text
    gone = [line.strip() for line in configured(SHIPPED, 8123, [8001]).splitlines() if line not in text.splitlines()]
    assert gone == ["retries 3", "option redispatch 1", "retry-on conn-failure empty-response 503"]


@needs_haproxy
def test_the_proxy_takes_a_replica_out_by_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(CONFIGURATION.parent).mkdir(parents=True)
    CONFIGURATION.write_text(SHIPPED)
    port = free_port()
    with proxy([port], retries=False) as front:
        wait_until(front.control.exists, 10.0)
        front.set_state(port, "maint")
        front.set_state(port, "ready")
        with pytest.raises(RuntimeError, match="haproxy"):
            front.set_state(port, "gone")


def test_no_two_replicas_have_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    named = iter([8001, 8001, 8002])
    monkeypatch.setattr(rolling, "free_port", lambda: next(named))
    assert rolling.free_ports(2) == [8001, 8002]


def test_a_replica_waits_before_it_stops_as_long_as_in_the_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert rolling.pre_stop_s() > 0


@pytest.mark.parametrize("line", ["    bind :8000", "    server-template ", "resolvers "])
def test_a_configuration_without_a_place_for_addresses_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="has no line"):
        configured(SHIPPED.replace(line, "# "), 8123, [8001])


def test_whatever_is_not_answered_rightly_has_failed() -> None:
    load = Load(sent=10)
    load.outcome.statuses.update({200: 6, 503: 1})
    load.outcome.wrong = 1
    load.large.update({"answered": 5, "failed": 2})
    assert load.failed == 4 + 1 + 2
    found = figures(load, [Replacement(1.0, 2.0, 0), Replacement(3.0, 4.0, 143)], 60.0)
    assert found["rolling_failed"] == 4 + 1 + 2 + 1
    assert found["unanswered"] == 3
    assert found["replaced"] == 2


def test_without_a_proxy_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert rolling.main([]) == 2
    assert "apt-get install haproxy" in capsys.readouterr().err
