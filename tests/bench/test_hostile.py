"""The parts of `make hostile` that decide what is measured and what is written."""

import json
from pathlib import Path

import pytest
from dense_reward.settings import Settings

from bench.hostile import __main__ as command
from bench.hostile import secrets
from bench.hostile.corpus import LIMIT_BYTES, HostileBody, corpus
from bench.hostile.watch import Seen, Watcher


def test_the_corpus_has_many_different_bodies() -> None:
    names = [body.name for body in corpus()]
    assert len(names) >= 60
    assert len(set(names)) == len(names)
    assert Settings.model_fields["max_body_bytes"].default == LIMIT_BYTES, "most bodies are just below it"


def test_a_body_is_a_whole_request() -> None:
    plain = HostileBody("a", lambda: b"{}").bytes_of_request()
    assert plain.startswith(b"POST /score HTTP/1.1\r\n")
    assert plain.endswith(b"Content-Length: 2\r\n\r\n{}")
    chunked = HostileBody("a", lambda: b"{ }", chunk_bytes=2).bytes_of_request()
    assert chunked.endswith(b"chunked\r\n\r\n2\r\n{ \r\n1\r\n}\r\n0\r\n\r\n")


def test_what_was_under_way_is_seen_and_half_a_line_is_not(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("1.0 0.5 200 0.0\n2.0 3.0 200 0.0\n6.0 0.1 0 0.2\n6.2 0.")
    assert Watcher(tmp_path / "lines").seen(4.0) == [Seen(2.0, 3.0, 200, 0.0), Seen(6.0, 0.1, 0, 0.2)]


def test_a_stage_replaces_its_own_figures_and_keeps_those_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "hostile.json"
    results.write_text(json.dumps({"stages": {"signals": {"figures": {"signals_late": 0}}, "bodies": {"figures": {}}}}))
    monkeypatch.setattr(command, "RESULTS", results)
    monkeypatch.setattr(command, "STAGES", {"bodies": lambda: ({"bodies": 85}, {"more": 1})})
    assert command.main(["--only", "bodies"]) == 0
    written = json.loads(results.read_text())
    assert (written["signals_late"], written["bodies"]) == (0, 85)
    assert written["stages"]["bodies"]["more"] == 1
    with pytest.raises(SystemExit):
        command.main(["--only", "nothing"])


@pytest.mark.slow
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_key_is_in_what_a_service_writes_or_answers(log_format: str) -> None:
    assert [place.name for place in secrets.of_service(log_format) if place.holds_key] == []
