"""Trackers get the numbers of metrics.jsonl; one that is not installed is refused with the command that installs it."""

import json
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from dense_reward_trainer.cli import main
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.runs import trackers
from dense_reward_trainer.runs.run_folder import MetricsLog, Run

pytestmark = pytest.mark.slow


class FakeTracker(ModuleType):
    """Stands for wandb or trackio: both have init, and a run with log."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # transformers looks for it
        self.started: list[Mapping[str, object]] = []
        self.logged: list[tuple[int, Mapping[str, float]]] = []

    def init(self, **options: object) -> "FakeTracker":
        self.started.append(options)
        return self

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.logged.append((step, values))


class FakeWriter:
    """Stands for TensorBoard's SummaryWriter."""

    made: list["FakeWriter"] = []  # noqa: RUF012 - the test clears it

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        """Nothing is buffered."""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeTracker]:
    made = {name: FakeTracker(name) for name in ("wandb", "trackio")}
    for name, fake in made.items():
        monkeypatch.setitem(sys.modules, name, fake)
    tensorboard = ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    FakeWriter.made.clear()
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    return made


def test_each_tracker_gets_each_number_once_and_knows_the_run(fakes: dict[str, FakeTracker], tmp_path: Path) -> None:
    run = Run(tmp_path, "sft-1", resumed=True)
    opened = trackers.open_trackers(("tensorboard", "wandb", "trackio", "wandb"), run, {"seed": 7}, 20)
    MetricsLog(tmp_path / "metrics.jsonl", opened).append(21, {"loss": 0.5, "answers": None})
    for fake in fakes.values():
        assert fake.logged == [(21, {"loss": 0.5})]
        (options,) = fake.started
        assert options["config"] == {"seed": 7}
        assert options["resume"] == "allow"
        assert "sft-1" in (options.get("id"), options["name"]), "a resumed run goes on in its own entry"
    (writer,) = FakeWriter.made
    assert writer.scalars == [("loss", 0.5, 21)]
    assert (writer.folder, writer.purge_step) == (str(tmp_path / "tensorboard"), 21)


def test_a_run_of_sft_reports_to_its_trackers(
    fakes: dict[str, FakeTracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "trackio")  # TRL reads more of it than the fake has
    given = ["report_to=[wandb, tensorboard]", "max_steps=2", "log_every_steps=1", "threads=1"]
    assert main(["sft", "arithmetic_sft_tiny", f"output_dir={tmp_path / 'run'}", *given]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in fakes["wandb"].logged] == lines
    config = fakes["wandb"].started[0]["config"]
    assert isinstance(config, dict)
    assert config["max_steps"] == 2
    assert FakeWriter.made[0].folder == str(tmp_path / "run" / "tensorboard")


@pytest.mark.parametrize("job", ["sft", "dpr"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_else(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    recipe = {"sft": "arithmetic_sft_tiny", "dpr": "arithmetic_dpr_tiny"}[job]
    assert main([job, recipe, f"output_dir={tmp_path / 'run'}", "report_to=[wandb, trackio]"]) == 2
    assert "pip install wandb trackio" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "arithmetic_sft_tiny", f"output_dir={tmp_path / 'run'}", "report_to=[mlflow]"]) == 2
    assert "'tensorboard', 'wandb' or 'trackio'" in capsys.readouterr().err


def test_the_check_names_only_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="pip install trackio, or"):
        trackers.check_trackers(("trackio",))
