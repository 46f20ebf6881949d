"""The key of a reward service comes from a file, and no line that a job prints holds one."""

import json
from pathlib import Path

import pytest
from dense_reward_trainer.configs.service import ServiceOptions
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.rl.reward_service import ServiceAddress, pinned_pair
from running_service import served

KEY = "a-key-of-the-job-that-trains"


def address(url: str, key_file: Path | None = None) -> ServiceAddress:
    return ServiceAddress.of(url, ServiceOptions(service_key_file=key_file, service_patience_s=20))


def test_a_job_sends_the_key_of_its_file(tmp_path: Path) -> None:
    keys, mine = tmp_path / "keys.json", tmp_path / "key"
    keys.write_text(json.dumps([{"name": "job", "key": KEY}]))
    mine.write_text(f"{KEY}\n")
    with served(api_keys_file=keys) as running:
        url = str(running.client.base_url)
        with pinned_pair(address(url, mine), lambda _: None) as pair:
            assert pair.card.name == "default"
        with pytest.raises(JobError, match="cannot be used"), pinned_pair(address(url), lambda _: None):
            pass


@pytest.mark.parametrize(("text", "reason"), [(None, "cannot be read"), (" \n", "is empty: write the key into it")])
def test_a_file_without_a_key_is_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "key").write_text(text)
    with pytest.raises(ConfigError, match=f"service_key_file: .*{reason}"):
        address("http://127.0.0.1:9", tmp_path / "key").key()


def test_no_line_holds_the_key_of_a_url() -> None:
    lines: list[str] = []
    failing = address(f"http://job:{KEY}@127.0.0.1:9")
    options = ServiceOptions(service_patience_s=0.1)
    with (
        pytest.raises(JobError) as failed,
        pinned_pair(ServiceAddress.of(failing.url, options), lines.append),
    ):
        pass
    assert lines
    assert KEY not in "".join([*lines, str(failed.value)])
