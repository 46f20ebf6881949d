"""The parts of `make evaluation` that decide what is right."""

import pytest
from dense_reward_trainer.benchmarks.first_errors import f1 as f1_of_job
from dense_reward_trainer.benchmarks.first_errors import first_error_counts
from dense_reward_trainer.benchmarks.thresholds import padded_values

from bench.evaluation import __main__ as command
from bench.evaluation import formats
from bench.evaluation.judging import TRUE_RATE, verdict
from bench.evaluation.planted import f1


def test_the_scripted_verdict_does_not_depend_on_the_place_of_an_answer() -> None:
    assert verdict("policy win 1", "baseline 1") == "My verdict: [[A]]"
    assert verdict("baseline 1", "policy win 1") == "My verdict: [[B]]"
    assert verdict("policy loss 1", "baseline 1") == "My verdict: [[B]]"
    assert verdict("baseline 1", "policy tie 1") == "My verdict: [[C]]"
    assert pytest.approx(0.6) == TRUE_RATE


def test_the_metric_in_plain_loops_is_that_of_the_job() -> None:
    values, labels = [[-1.0, -5.0], [-0.5], [-4.0, -4.0], [-3.0, -0.1]], [1, -1, 0, 1]
    of_job = first_error_counts([None if one < 0 else one for one in labels], "first_drop")(padded_values(values), -2.0)
    assert f1(values, labels, -2.0) == pytest.approx(float(f1_of_job(of_job.sum(axis=0)))) == 0.8


def test_every_format_is_written_and_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "OWN_PROGRAMS", {})  # they need an environment of their own: make evaluation
    figures, _ = formats.measure()
    assert isinstance(figures["formats"], list)
    assert [one["name"] for one in figures["formats"]] == [*formats.LABELS, *formats.READ]


def test_every_stage_has_a_name_for_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "no such stage"])
    said = capsys.readouterr().err
    assert all(name in said for name in command.STAGES)
