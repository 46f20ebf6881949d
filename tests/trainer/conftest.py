"""Fixtures of the trainer's tests: one served pair per session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from served_pair import ServedPair, free_port, write_pair


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft, reference and held_out.jsonl: read them only."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


@pytest.fixture(scope="session")
def served(pair_folder: Path) -> Iterator[ServedPair]:
    """That pair behind a real service in its own process."""
    pair = ServedPair(pair_folder, free_port())
    pair.start()
    try:
        pair.wait_until_ready()
        yield pair
    finally:
        pair.kill()
