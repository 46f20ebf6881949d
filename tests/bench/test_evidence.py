"""The figures of evidence.json, and the cells of its tables."""

from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.studies.regimes.config import SweepConfig
from dense_reward_trainer.studies.regimes.policies import SampledPolicy

from bench.results_page import StudyFile, study_source
from bench.studies.evidence import boundary_keys, gain_keys, preview_keys
from bench.studies.evidence_page import NAMES, interval, preview_block


def found(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def check(kind: str, *, right: bool) -> dict[str, object]:
    verdict = {"verdict": kind, "reason": "because"}
    figures = {"over_sft": 0.2, "over_control": 0.1}
    return {"regime": "mixed", "reference": "base", "verdict": verdict, "right": right, **figures}


def test_gains_are_those_over_the_best_control_of_each_metric() -> None:
    metrics = ("greedy_accuracy", "sampled_accuracy")
    primary = {
        "best_control": {"greedy_accuracy": "majority", "sampled_accuracy": "extrapolated"},
        "best_of_one_model": dict.fromkeys(metrics, "majority"),
        "differences": {
            metric: {"majority": {"interval": found(0.5)}, "extrapolated": {"interval": found(0.25)}}
            for metric in metrics
        },
    }
    keys = gain_keys(primary)
    assert keys["regime_a_greedy_gain"] == keys["regime_a_sampled_gain_over_one_model"] == 0.5
    assert (keys["regime_a_sampled_gain"], keys["regime_a_sampled_gain_ci_low"]) == (0.25, 0.15)
    assert keys["regime_a_sampled_control"] == "extrapolated"
    assert gain_keys(None) == {}, "a study of which this regime is not finished"


def test_the_boundary_is_read_where_the_demonstrations_are_worst() -> None:
    places = {
        "worse": {"shift": found(-0.4), "gain": found(-0.2)},
        "better": {"shift": found(0.3), "gain": found(0.4)},
    }
    assert boundary_keys(places) == {"boundary_gain": -0.2, "boundary_gain_ci_high": -0.1}
    checks = [check("gain", right=True), check("gain", right=False), check("unknown", right=False)]
    assert preview_keys(checks) == {"preview_right": 1, "preview_runs": 3, "preview_unknown": 1}


def test_verdicts_are_counted_for_each_task_and_reference() -> None:
    checks = [
        check("gain", right=True),
        check("unknown", right=False),
        check("no", right=True) | {"reference": "early"},
    ]
    block = preview_block(checks)
    assert "| mixed | base | expect a gain: 1, cannot tell: 1 | +0.200 | +0.100 | 1 of 2 |" in block
    assert "| mixed | early | do not train: 1 |" in block
    assert block.endswith("2 of 3 verdicts were right; 1 could not tell.")


def test_an_interval_without_spread_is_not_printed_as_one() -> None:
    assert interval({"value": 1.0, "low": 1.0, "high": 1.0}) == "1.000 (no spread)"
    assert interval(found(0.5)) == "0.500 [0.400, 0.600]"
    assert interval(None) == "-"


def test_the_source_is_the_commit_of_the_jobs_and_not_of_their_analysis() -> None:
    file: StudyFile = {
        "commit": "cccccccccccccccc",
        "machine": {"processor": "cpu", "cores": 2},
        "versions": {"torch": "1", "transformers": "2"},
        "study": {},
        "study_commits": {"aaaaaaaaaaaaaaaa": 9},
    }
    assert "commit aaaaaaaaaaaa, cpu" in study_source("evidence.json", file)
    several: StudyFile = {**file, "study_commits": {"aaaaaaaaaaaaaaaa": 9, "bbbb": 1}}
    assert study_source("evidence.json", several).endswith(" 1 of 10 jobs ran at other commits.")


def test_names_in_the_tables_state_the_recipe() -> None:
    config = load_config(SweepConfig, config_path("evidence_sweep"))
    assert set(config.policies) <= NAMES.keys()
    power = config.policies["power_4"]
    assert isinstance(power, SampledPolicy)
    assert power.options["choose"] == {"samples": 8, "by": "power", "power": 4}
    assert NAMES["power_4"] == "power sampling, π_sft⁴ from 8 samples"
