"""The notebook: its cells run from two checkpoints to a trained policy, and it is committed with what they showed."""

import json
import re
from pathlib import Path
from subprocess import Popen

import pytest
from dense_reward import Scored
from dense_reward.manifest import load_manifest

from docs.notebooks.run import NOTEBOOK, Cell, run

TINY = [f"scratch.{key}" for key in ("hidden_size=32", "intermediate_size=64", "layers=2", "heads=2")]
SMALLER = {
    "base": ["epochs=1", "data.limit=320", "threads=1", *TINY],
    "sft": ["epochs=1", "threads=1"],
    "preview": ["prompts=4", "samples_per_prompt=1", "threads=1"],
    "dpr": ["steps=1", "warmup_steps=0", "prompts_per_step=4", "held_out_options.limit=4", "threads=1"],
}


def cells() -> list[Cell]:
    found: list[Cell] = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return found


def kinds(ran: list[Cell]) -> list[list[list[str]]]:
    """The kinds of the outputs of each cell: a stream, a picture or a text."""
    return [
        [sorted(data) if isinstance(data := one.get("data"), dict) else ["stream"] for one in cell.get("outputs", [])]
        for cell in ran
    ]


@pytest.mark.story
def test_every_cell_runs_on_a_real_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cells()
    namespace: dict[str, object] = {}
    try:
        run(ran, namespace, {"WORK": "work", "SMALLER": SMALLER})
    finally:
        if isinstance(service := namespace.get("service"), Popen):
            service.kill()
            service.wait()
    assert load_manifest(tmp_path / "work" / "dpr" / "checkpoints" / "policy").role == "policy"
    assert (tmp_path / "work" / "figure.pdf").read_bytes().startswith(b"%PDF")
    scored = namespace["scored"]
    assert isinstance(scored, Scored)
    assert "response 2" in (scored._repr_html_() or "")
    assert kinds(ran) == kinds(cells())


def test_it_is_committed_as_it_ran_whole_and_without_places_of_a_machine() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    text = json.dumps([cell["outputs"] for cell in code])
    assert text.count("image/png") == 2
    assert not re.search(r"/(tmp|home|root|work|usr|Users)/|Traceback", text)
    assert "verdict: expect a gain" in text
