"""The stages of a day with a GPU, on a CPU with tiny models: each runs and writes its figures."""

import json
from pathlib import Path

import pytest
import torch

from bench.gpu import report
from bench.gpu.__main__ import main
from bench.gpu.machine import Machine
from bench.gpu.stages import STAGES
from bench.tables import block_of

pytestmark = pytest.mark.slow


def test_a_stage_writes_its_figures_and_keeps_what_others_wrote(tmp_path: Path) -> None:
    file = tmp_path / "gpu_day.json"
    file.write_text(json.dumps({"earlier": {"state": "done"}}))
    assert main(["--device", "cpu", "--tiny", "--out", str(file), "--stage=heads"]) == 0
    found = json.loads(file.read_text())
    assert {name: of_stage["state"] for name, of_stage in found.items()} == {"earlier": "done", "heads": "done"}
    assert found["heads"]["device"] == "cpu"
    assert found["heads"]["versions"]["torch"]


@pytest.mark.parametrize("name", sorted(STAGES.keys() - {"tests", "heads"}))
def test_every_stage_runs(name: str) -> None:
    """All but `tests`, which runs this suite. `graphs` does nothing without a GPU."""
    found: dict[str, object] = {}
    STAGES[name](Machine(torch.device("cpu"), tiny=True), lambda **figures: found.update(figures))
    assert bool(found) is (name != "graphs")
    if name == "speed_15b":
        batch = found["d: 1 x (128 + 128)"]
        assert isinstance(batch, dict)
        assert set(batch["milliseconds"]) == {"reward", "kl and entropy", "transformers plain", "transformers best"}


def test_a_stage_that_fails_or_hangs_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu_day.json"
    assert main(["--device", "nonsense", "--out", str(file), "--stage=heads"]) == 1
    assert main(["--device", "cpu", "--tiny", "--limit-s", "0.01", "--out", str(file), "--stage=memory"]) == 1
    found = json.loads(file.read_text())
    assert found["heads"]["state"] == "failed"
    assert "nonsense" in found["heads"]["log"]
    assert found["memory"]["state"] == "too long"
    assert "not done: memory" in capsys.readouterr().out


def test_every_stage_has_a_line_that_says_what_it_does() -> None:
    assert all(stage.__doc__ for stage in STAGES.values())


def test_the_page_shows_what_was_measured() -> None:
    assert block_of(report.PAGE, report.BLOCK) == report.block(json.loads(report.FILE.read_text())), (
        "run `python -m bench.gpu.report`"
    )
