"""Every checkpoint of the corpus is refused in words beside a served pair, which is served on; the next one loads."""

import gc
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from dense_reward.serving.loaders import loader
from running_service import Served, served

from bench.hostile.checkpoint_corpus import HOSTILE, write_hostile
from bench.hostile.checkpoint_parts import write_parts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

KEY = "key-of-the-operator"
ENTRY = {"name": "operator", "key": KEY, "rights": ["score", "admin"]}
IDS = {"prompt_ids": [1, 2, 3], "response_ids": [[4, 5], [6]]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all checkpoints must be in, with healthy ones."""
    root = tmp_path_factory.mktemp("hostile") / "checkpoints"
    write_parts(root / "healthy")
    (root.parent / "keys.json").write_text(json.dumps([ENTRY]))
    return root


@pytest.fixture(scope="module")
def service(checkpoints: Path) -> Iterator[Served]:
    healthy = checkpoints / "healthy"
    with served(
        loader("torch"),
        sft=healthy / "sft",
        reference=healthy / "reference",
        api_keys_file=checkpoints.parent / "keys.json",
        checkpoints_folder=checkpoints,
        device="cpu",
    ) as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running


def load(running: Served, sft: Path, reference: Path) -> httpx2.Response:
    source = {"name": "other", "sft": str(sft), "reference": str(reference)}
    return running.client.post("/admin/models", json=source)


@contextmanager
def manual_collections() -> Iterator[Callable[[], int]]:
    """How many full collections were asked for in the block; the interpreter's own are off."""
    gc.disable()
    try:
        before = gc.get_stats()[2]["collections"]
        yield lambda: gc.get_stats()[2]["collections"] - before
    finally:
        gc.enable()


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_words(service: Served, checkpoints: Path, name: str) -> None:
    at = [*HOSTILE].index(name)
    answer = load(service, *write_hostile(checkpoints / "healthy", name, checkpoints / "hostile" / str(at)))
    assert answer.status_code == 422, answer.text
    message = answer.json()["error"]["message"]
    assert re.search(HOSTILE[name].says, message), message
    assert "it cannot be loaded (" not in message, "no error of a library as it is"


def test_what_is_refused_before_its_weights_are_loaded_makes_no_full_collection(
    service: Served, checkpoints: Path
) -> None:
    """Each stops all callers, and anyone who may load could ask for many."""
    pair = write_hostile(checkpoints / "healthy", "changed weights", checkpoints / "hostile" / "again")
    with manual_collections() as collections:
        assert load(service, *pair).status_code == 422
        assert collections() == 0
        assert load(service, checkpoints / "healthy" / "sft", checkpoints / "healthy" / "reference").is_success
        assert collections() > 0, "what the pair replaced is freed"


def test_a_healthy_one_loads_after_all_of_them_and_the_served_pair_is_as_before(
    service: Served, checkpoints: Path
) -> None:
    before = service.score(IDS).json()["results"]
    healthy = checkpoints / "healthy"
    for source in ("sft", "adapter"):
        answer = load(service, healthy / source, healthy / "reference")
        assert answer.status_code == 200, answer.text
    assert service.score(IDS).json()["results"] == before
