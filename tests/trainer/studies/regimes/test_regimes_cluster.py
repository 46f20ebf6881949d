"""The cells of a regimes study as jobs of a cluster, with a submitit that runs them at once in this process."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import pytest
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.studies.regimes import study as regimes
from dense_reward_trainer.studies.regimes.cell import Cell
from regimes_study import cell_of, figures, study


def test_a_missing_submitit_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    small = study(output_dir=tmp_path, submitit={"timeout_min": 5})
    with pytest.raises(ConfigError, match="pip install submitit"):
        regimes.run_cells([Cell(small, "mixed", 1, {})], small, "seeds", print)


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A job of a cluster that ended with an error, or without."""

    error: Exception | None

    def exception(self) -> Exception | None:
        return self.error


class AtOnce:
    """submitit's executor, with jobs that run at once in this process."""

    def __init__(self, folder: Path, cluster: object = None) -> None:
        if cluster == "moon":
            raise ValueError("AutoExecutor doesn't know any executor named moon")
        self.options: dict[str, object] = {}

    def update_parameters(self, **options: object) -> None:
        if "minutes" in options:
            raise NameError("Unknown argument(s): minutes")
        self.options |= options

    def map_array(self, function: Callable[[Cell], object], cells: Sequence[Cell]) -> list[FinishedJob]:
        assert self.options == {"timeout_min": 5}
        jobs = []
        for one in cells:
            try:
                function(one)
            except JobError as error:
                jobs.append(FinishedJob(RuntimeError(f"Job failed during processing with trace:\n{error}")))
            else:
                jobs.append(FinishedJob(None))
        return jobs


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("submitit")
    monkeypatch.setattr(module, "AutoExecutor", AtOnce, raising=False)
    monkeypatch.setitem(sys.modules, "submitit", module)


@pytest.mark.usefixtures("cluster")
def test_cells_become_jobs_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = study(output_dir=tmp_path, submitit={"cluster": "debug", "timeout_min": 5})
    cells = [Cell(small, "mixed", seed, {}) for seed in (1, 2)]
    found = cell_of({"sft": figures(0.5)})

    def leave_figures(one: Cell) -> None:
        one.folder.mkdir(parents=True)
        one.figures.write_text(json.dumps(asdict(found)))

    monkeypatch.setattr(regimes, "logged_cell", leave_figures)
    assert regimes.run_cells(cells, small, "seeds", print) == [found, found]


@pytest.mark.usefixtures("cluster")
def test_a_job_of_a_cluster_that_leaves_no_figures_is_not_run_again_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = study(output_dir=tmp_path, submitit={"timeout_min": 5})
    monkeypatch.setattr(regimes, "logged_cell", lambda _: None)
    with pytest.raises(
        JobError, match=r"mixed, seed 1 ended, but .*figures.json is not here: put output_dir on a file"
    ):
        regimes.run_cells([Cell(small, "mixed", 1, {})], small, "seeds", print)

    def fail(_: Cell) -> None:
        raise JobError("sft failed with exit code 2")

    monkeypatch.setattr(regimes, "logged_cell", fail)
    with pytest.raises(JobError, match=r"mixed, seed 1: sft failed with exit code 2; more in .*log.txt"):
        regimes.run_cells([Cell(small, "mixed", 1, {})], small, "seeds", print)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("options", "complaint"), [({"cluster": "moon"}, "named moon"), ({"minutes": 5}, "Unknown argument.*minutes")]
)
def test_options_that_submitit_refuses_are_named(tmp_path: Path, options: dict[str, object], complaint: str) -> None:
    small = study(output_dir=tmp_path, submitit=options)
    with pytest.raises(ConfigError, match=f"submitit refuses these options: .*{complaint}"):
        regimes.run_cells([Cell(small, "mixed", 1, {})], small, "seeds", print)
