"""The file of keys: valid content, when a change takes effect, and the limits of each key, by the test's clock."""

import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from dense_reward.errors import RequestError, SettingsError
from dense_reward.http.keys import Caller, Keys

Entry = dict[str, object]
ALICE: Entry = {"name": "alice", "key": "a" * 16}
BOB: Entry = {"name": "bob", "key": "b" * 16, "rights": ["admin"]}


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Written:
    """A file of keys, and the keys that were read from it."""

    file: Path
    clock: Clock
    keys: Keys

    def known(self, key: str) -> Caller:
        found = self.keys.caller(key)
        assert found is not None
        return found

    def write(self, text: str) -> None:
        self.file.write_text(text)


def written(folder: Path, *entries: Entry) -> Written:
    file, clock = folder / "keys.json", Clock()
    file.write_text(json.dumps(entries))
    return Written(file, clock, Keys(file, clock))


def test_a_key_names_its_holder_and_anything_else_names_nobody(tmp_path: Path) -> None:
    there = written(tmp_path, ALICE, BOB)
    assert (there.known("a" * 16).name, there.known("b" * 16).rights) == ("alice", frozenset({"admin"}))
    for other in ("", "a" * 15, "a" * 17, "A" * 16, "ü" * 16, "\ud800"):
        assert there.keys.caller(other) is None


def test_no_secret_can_be_read_from_what_is_kept(tmp_path: Path) -> None:
    assert "aaaa" not in repr(written(tmp_path, ALICE).known("a" * 16))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "at least 1 item"),
        ("{}", "valid array"),
        ("[", "Invalid JSON"),
        ('[{"name": "a", "key": "secretsecret"}]', "a key must have at least 16 characters, not 12"),
        ('[{"name": "a b", "key": "secretsecretsecret"}]', "0.name: String should match pattern"),
        ('[{"name": "a", "key": "secretsecret secret"}]', "a header cannot carry other characters"),
        ('[{"name": "a", "key": "secretsecretsecrét"}]', "a header cannot carry other characters"),
        ('[{"name": "a", "key": "secretsecretsecret", "rights": ["read"]}]', "'score' or 'admin'"),
        ('[{"name": "a", "key": "secretsecretsecret", "rights": []}]', "0.rights"),
        ('[{"name": "a", "key": "secretsecretsecret", "role": "x"}]', "0.role: Extra inputs are not permitted"),
        (json.dumps([ALICE | {"max_concurrent": True}]), "0.max_concurrent: Input should be a valid integer"),
        (json.dumps([ALICE, ALICE | {"key": "c" * 16}]), "two entries have the same name"),
        (json.dumps([ALICE, ALICE | {"name": "carol"}]), "two entries have the same key"),
    ],
)
def test_a_wrong_file_is_refused_without_repeating_a_secret(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(SettingsError) as refused:
        Keys(tmp_path / "keys.json")
    assert reason in str(refused.value)
    assert str(tmp_path / "keys.json") in str(refused.value)
    assert not any(secret in str(refused.value) for secret in ("secretsecret", "aaaa", "cccc"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        Keys(tmp_path / "none.json")


def test_a_changed_file_counts_at_once(tmp_path: Path) -> None:
    there = written(tmp_path, ALICE)
    there.write(json.dumps([BOB]))
    assert there.keys.caller("a" * 16) is None
    assert there.known("b" * 16).name == "bob"


def test_a_link_that_is_pointed_elsewhere_counts_at_once(tmp_path: Path) -> None:
    """Kubernetes updates a mounted secret like this."""
    for name, entry in (("old", ALICE), ("new", BOB)):
        (tmp_path / name).mkdir()
        written(tmp_path / name, entry)
    (tmp_path / "data").symlink_to("old")
    keys = Keys(tmp_path / "data" / "keys.json")
    (tmp_path / "next").symlink_to("new")
    (tmp_path / "next").rename(tmp_path / "data")
    assert keys.caller("a" * 16) is None
    assert keys.caller("b" * 16) is not None


@pytest.mark.parametrize("broken", ["[", None])
def test_a_file_that_breaks_leaves_the_old_keys_and_says_so(
    tmp_path: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    there = written(tmp_path, ALICE)
    there.file.unlink() if broken is None else there.write(broken)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert there.known("a" * 16).name == "alice"
    assert len(caplog.records) == 1
    there.write(json.dumps([BOB]))
    assert there.known("b" * 16).name == "bob"


def test_a_list_that_could_not_be_read_counts_once_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `mv` of a file of another user, and `chmod` later: a revoked key must not stay valid."""
    there = written(tmp_path, ALICE)
    there.write(json.dumps([BOB]))
    with monkeypatch.context() as closed:
        closed.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert there.known("a" * 16).name == "alice"
    there.file.chmod(0o640)
    assert there.keys.caller("a" * 16) is None


def test_requests_at_once_are_counted_also_over_a_change_of_the_file(tmp_path: Path) -> None:
    there = written(tmp_path, ALICE | {"max_concurrent": 2})
    with ExitStack() as inside:
        for _ in range(2):
            inside.enter_context(there.known("a" * 16).admitted(there.clock()))
        there.write(json.dumps([BOB, ALICE | {"max_concurrent": 2}]))
        with pytest.raises(RequestError, match="2 requests in flight"):
            inside.enter_context(there.known("a" * 16).admitted(there.clock()))
    with there.known("a" * 16).admitted(there.clock()):
        pass


def test_requests_a_minute_come_in_a_burst_and_then_at_their_rate(tmp_path: Path) -> None:
    there = written(tmp_path, ALICE | {"requests_per_minute": 30})

    def asked() -> None:
        with there.known("a" * 16).admitted(there.clock()):
            pass

    for _ in range(30):
        asked()
    with pytest.raises(RequestError, match="limited to 30 requests per minute") as refused:
        asked()
    assert (refused.value.status, refused.value.retry_after_s) == (429, 2.0)
    there.clock.now_s += 2
    asked()
    with pytest.raises(RequestError):
        asked()
    there.clock.now_s += 3600
    for _ in range(30):
        asked()
    with pytest.raises(RequestError):
        asked()
