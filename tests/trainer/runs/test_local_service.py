"""A pair served for a while: ready inside the block, gone after it. A service that cannot start is reported."""

import shutil
import socket
from pathlib import Path

import pytest
from dense_reward import Client, ScoreOptions
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.runs.local_service import free_port, serving, serving_head, serving_run
from tiny_heads import write_head

pytestmark = pytest.mark.slow


def test_a_pair_can_be_asked_inside_the_block_and_is_gone_after_it(pair_folder: Path) -> None:
    pair = pair_folder / "sft", pair_folder / "reference"
    with serving(*pair, free_port(), threads=1) as (server, url), Client(url) as client:
        assert [card.name for card in client.models()] == ["default"]
        assert server.poll() is None
    assert server.poll() is not None


def test_a_run_is_served_with_a_pair_for_each_reference(pair_folder: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for name, source in (("sft", "sft"), ("early", "reference"), ("later", "reference")):
        shutil.copytree(pair_folder / source, checkpoints / name)
    with serving_run(tmp_path / "run", free_port(), threads=1) as (server, url), Client(url) as client:
        assert [card.name for card in client.models()] == ["early", "later"]
        scored = [
            client.score(prompt="Add 12 and 34.", responses=["46", "47"], options=ScoreOptions(model=name)).results
            for name in ("early", "later")
        ]
        assert [one.sum for one in scored[0]] == [one.sum for one in scored[1]]
    assert server.poll() is not None


def test_a_token_head_is_served_by_itself(tmp_path: Path) -> None:
    write_head(tmp_path / "head")
    with serving_head(tmp_path / "head", free_port(), threads=1) as (server, url), Client(url) as client:
        assert [card.token_head for card in client.models()] == [str(tmp_path / "head")]
    assert server.poll() is not None


def test_a_service_that_ends_before_it_could_score_is_told_of_at_once_with_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(JobError, match=r"ended with exit code [1-9]\d* before it could score"),
        serving(tmp_path / "sft", tmp_path / "reference", free_port(), threads=0),
    ):
        pass
    assert "threads" in capfd.readouterr().err


def test_a_port_that_is_taken_is_not_the_one_that_is_given() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = int(listener.getsockname()[1])
        assert free_port(taken) != taken
