"""Fixtures of the trainer's tests: one served pair per session, and one service of two references."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_pair import ServedPair, free_port, write_pair


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft, reference, early and held_out.jsonl: read them only."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


@pytest.fixture(scope="session")
def served(pair_folder: Path) -> Iterator[ServedPair]:
    """That pair behind a real service in its own process."""
    yield from running(ServedPair(pair_folder, free_port()))


@pytest.fixture(scope="session")
def served_run(pair_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPair]:
    """The sft model with both references, as the pairs `half` and `early` of one service."""
    listed = [
        {"name": name, "sft": str(pair_folder / "sft"), "reference": str(pair_folder / folder)}
        for name, folder in (("half", "reference"), ("early", "early"))
    ]
    pairs_file = tmp_path_factory.mktemp("pairs") / "pairs.json"
    pairs_file.write_text(json.dumps(listed))
    yield from running(ServedPair(pair_folder, free_port(), pairs_file))


def running(pair: ServedPair) -> Iterator[ServedPair]:
    """The pair, started; it is killed when the iterator ends."""
    pair.start()
    try:
        pair.wait_until_ready()
        yield pair
    finally:
        pair.kill()
