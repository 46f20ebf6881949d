"""The regimes study without its jobs: what is tuned, matched, compared and refused."""

import json
from pathlib import Path

import pytest
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.studies.regimes import flops
from dense_reward_trainer.studies.regimes import jobs as regimes_jobs
from dense_reward_trainer.studies.regimes import study as regimes
from dense_reward_trainer.studies.regimes.cell import Cell, evaluated_policies
from dense_reward_trainer.studies.regimes.figures import CellFigures, at_matched_kl
from dense_reward_trainer.studies.regimes.policies import AnyPolicy, controls, free_controls
from dense_reward_trainer.studies.regimes.preview import Verdict, check_previews
from dense_reward_trainer.studies.regimes.table import (
    compare_primary,
    format_comparison,
    format_previews,
    format_table,
    place,
    summarise,
)
from dense_reward_trainer.studies.regimes.tuning import choice_lines, choose, tuned, variant_name, variants
from dense_reward_trainer.tasks.records import TaskData, demonstration
from known_policies import write_known_policy
from pydantic import JsonValue
from regimes_study import MIXED, POLICIES, SERIES, cell_of, figures, study


def option(policy: AnyPolicy, name: str) -> object:
    return policy.model_dump()[name]


def test_a_dpr_token_costs_what_its_parts_cost() -> None:
    assert flops.dpr_flops_per_token(1) == 2 + 2 + 2 * 2 + 6
    assert flops.matched_sft_steps(dpr_tokens=600, updates_per_batch=1, sft_tokens_per_step=100) == 14
    assert flops.matched_sft_steps(dpr_tokens=600, updates_per_batch=4, sft_tokens_per_step=100) == 32
    assert flops.matched_sft_steps(dpr_tokens=1, updates_per_batch=1, sft_tokens_per_step=100) == 1


def test_tokens_of_an_sft_run_are_counted_across_a_resumption() -> None:
    counts = [(10, 1000), (20, 1900), (30, 900), (40, 1800), (50, None)]
    lines: list[dict[str, float | None]] = [{"step": step, "num_tokens": count} for step, count in counts if count]
    assert flops.tokens_per_step([*lines, {"step": 50.0, "loss": 0.1}]) == (1900 + 900) / 30
    with pytest.raises(JobError, match=r"lower sft.log_every_steps"):
        flops.tokens_per_step([{"step": 50.0, "loss": 0.1}])


def test_a_policy_at_a_matched_kl_is_interpolated_between_its_values() -> None:
    curve = [figures(0.5, kl=0.0), figures(0.7, kl=1.0), figures(0.9, kl=3.0)]
    assert at_matched_kl(curve, 0.5).sampled_accuracy == pytest.approx(0.6)
    assert at_matched_kl(curve, 2.0) == figures(0.8, kl=2.0)
    assert at_matched_kl(curve, 9.0) == curve[-1]
    assert at_matched_kl(curve, -0.1) == curve[0]
    with pytest.raises(ValueError, match="a KL can only be matched"):
        at_matched_kl(curve, None)


def test_every_value_of_a_grid_is_tried_and_the_best_one_is_used() -> None:
    small = study()
    tried = variants(small.policies)
    assert set(tried) == {
        *(variant_name("dpr", i) for i in range(3)),
        *(variant_name("continued", i) for i in range(2)),
        *(variant_name("cold", i) for i in range(3)),
    }
    assert option(tried["dpr--1"], "dpr") == {"learning_rate": 2e-4}
    assert option(tried["cold--2"], "options") == {"temperature": 0.4}
    assert option(tried["continued--1"], "matched_flops") == "dpr--0", "FLOPs do not depend on the learning rate"
    accuracies = {"dpr--0": 0.1, "dpr--1": 0.3, "dpr--2": 0.2, "continued--0": 0.2, "continued--1": 0.1}
    accuracies |= {"cold--0": 0.1, "cold--1": 0.2, "cold--2": 0.4}
    two = [cell_of({name: figures(value) for name, value in accuracies.items()}) for _ in range(2)]
    choices = choose(small.policies, two, "sampled_accuracy")
    assert (choices["dpr"].chosen, choices["dpr"].on_edge) == (2e-4, False)
    assert (choices["cold"].chosen, choices["cold"].on_edge) == (0.4, True)
    assert choices["continued"].chosen == 1e-4
    assert any("cold: temperature = 0.4 of 3 tried" in line and "edge" in line for line in choice_lines(choices))
    final = tuned(small.all_policies, choices)
    assert option(final["dpr"], "dpr") == {"learning_rate": 2e-4}
    assert not any(policy.grid for policy in final.values())
    assert option(final["continued"], "matched_flops") == "dpr"


def test_nested_options_are_tuned_too() -> None:
    tilted = {**POLICIES["tilted"], "grid": {"tilt.strength": [0.5, 2.0]}}
    found = variants(study(policies=POLICIES | {"tilted": tilted}).policies)
    assert option(found["tilted--1"], "options") == {"tilt": {"reference": "base", "strength": 2.0}}


def test_policies_that_need_the_log_ratio_are_no_controls() -> None:
    using = {name for name, policy in study().all_policies.items() if policy.uses_reward}
    assert using == {"dpr", "tilted", "best"}
    far = {"far": {"kind": "sampled", "options": {"extrapolate": {"base": "base", "strength": 1.0}}}}
    names, alone = controls(study(policies=POLICIES | far).all_policies)
    assert set(names) - set(alone) == {"far"}


def test_a_sample_of_a_checkpoint_that_was_trained_on_the_reward_is_no_control() -> None:
    more: dict[str, object] = {
        "dpr_cold": {"kind": "sampled", "options": {"checkpoint": "dpr", "temperature": 0.5}},
        "log_cold": {"kind": "sampled", "options": {"checkpoint": "dpr_log", "temperature": 0.5}},
        "half_way": {"kind": "sampled", "options": {"checkpoint": "reference"}},
        "far": {"kind": "sampled", "options": {"extrapolate": {"base": "base", "strength": 1.0}}},
    }
    small = study(policies=POLICIES | more)
    names, alone = controls(small.all_policies)
    assert "dpr_cold" not in names
    assert {"log_cold", "half_way"} <= set(names)
    assert "log_cold" in alone
    assert "half_way" not in alone
    assert free_controls(small.all_policies) == ["cold"]


def test_checkpoints_are_named_by_what_the_cell_trains() -> None:
    small = study()
    here = Cell(small, "mixed", 1, small.all_policies)
    found = evaluated_policies(here)
    assert found["sft"] == {"checkpoint": "unused/mixed/1/sft/checkpoints/sft"}
    assert found["base"] == {"checkpoint": "unused/mixed/1/sft/checkpoints/base"}
    assert found["dpr"] == {"checkpoint": "unused/mixed/1/dpr/checkpoints/policy"}
    assert found["continued"] == {"checkpoint": "unused/mixed/1/continued/checkpoints/sft"}
    assert found["tilted"] == {
        "checkpoint": "unused/mixed/1/sft/checkpoints/sft",
        "tilt": {"reference": "unused/mixed/1/sft/checkpoints/base", "strength": 1.0},
    }
    assert found["as_far--1"] == {"checkpoint": "unused/mixed/1/sft/checkpoints/sft", "temperature": 0.7}


def test_a_series_is_a_policy_for_each_value() -> None:
    series = {"gamma": {"of": "dpr", "key": "gamma", "values": [0.9, 1.0], "label": "discount"}}
    place_series = {
        "of": "dpr",
        "key": "reference",
        "values": ["base", "reference"],
        "label": "x",
        "positions": [0, 1],
    }
    policies = {"dpr": {"kind": "dpr", "reference": "base"}}
    small = study(policies=policies, series=series | {"place": place_series}, tuning=None)
    found = small.all_policies
    assert list(found) == ["dpr", "gamma_0.9", "gamma_1.0", "place_base", "place_reference"]
    assert option(found["gamma_0.9"], "dpr") == {"gamma": 0.9}
    assert option(found["place_reference"], "reference") == "reference"


CELLS = [
    cell_of(
        {"sft": figures(0.5), "dpr": figures(0.6), "control": figures(0.55), "majority": figures(0.58, None, None)}
    ),
    cell_of(
        {"sft": figures(0.7), "dpr": figures(0.9), "control": figures(0.75), "majority": figures(0.78, None, None)}
    ),
]


def test_gains_are_differences_within_a_seed() -> None:
    found = summarise(CELLS)["dpr"]["sampled_accuracy_gain"]
    assert found["value"] == pytest.approx(0.15)
    assert "greedy_accuracy" not in summarise(CELLS)["majority"]
    table = format_table({"mixed": CELLS})
    assert "0.150 [-0.485, 0.785]" in table
    assert table.count("\n") == 4


def test_the_primary_policy_is_compared_with_the_control_that_is_best_on_these_very_seeds() -> None:
    result = compare_primary(CELLS, "dpr", ["sft", "control", "majority"], ["sft", "control"])
    assert result.best_of_one_model == {"sampled_accuracy": "control", "greedy_accuracy": "sft"}
    assert result.best_control == {"sampled_accuracy": "majority", "greedy_accuracy": "sft"}
    found = result.differences["sampled_accuracy"]
    assert set(found) == {"sft", "control", "majority"}
    assert found["majority"].interval.value == pytest.approx(0.07)
    assert found["majority"].p_holm >= found["majority"].p
    assert result.differences["greedy_accuracy"]["majority"].interval.value == pytest.approx(1 - 0.68)
    assert "majority (best control)" in format_comparison({"mixed": result}, {"mixed": "dpr"})


def test_the_boundary_is_the_quality_of_the_demonstrations_less_that_of_the_start() -> None:
    found = place(CELLS, "dpr")
    assert found is not None
    assert found.shift.value == pytest.approx(0.3)
    assert found.gain.value == pytest.approx(0.15)
    assert place([cell_of({"sft": figures(0.1)}, right=None)], "sft") is None


@pytest.mark.parametrize(
    ("reached", "outcome"), [(0.515, "no"), (0.3, "no"), (0.6, "control"), (0.715, "control"), (0.73, "gain")]
)
def test_a_verdict_is_right_if_training_did_what_it_said(reached: float, outcome: str) -> None:
    policies = {name: figures(0.5, greedy=0.1) for name in ("sft", "tilted", "majority", "dpr")}
    policies |= {"cold": figures(0.7, greedy=0.1), "dpr_early": figures(reached)}
    small = study(policies=POLICIES | {"dpr_early": {"kind": "dpr", "reference": "early"}})
    found = CellFigures(policies, None, None)
    for said in ("gain", "control", "no", "unknown"):
        verdicts = {"early": Verdict(said, "because"), "never trained on": Verdict("gain", "because")}
        (check,) = check_previews("mixed", 1, found, small.all_policies, verdicts)
        assert (check.policy, check.outcome, check.right) == ("dpr_early", outcome, said == outcome)
        assert "of 1 verdicts" in format_previews([check])
    assert check_previews("mixed", 1, found, small.all_policies, {}) == []


def test_a_series_is_plotted_for_the_regimes_that_have_it(tmp_path: Path) -> None:
    regimes_of_two: dict[str, object] = {"all": MIXED, "few": MIXED | {"policies": ["dpr"]}}
    small = study(output_dir=tmp_path, series={"b": SERIES}, regimes=regimes_of_two)
    names = ("sft", "dpr", "b_0.5", "b_1.0")
    two = [cell_of({name: figures(value) for name in names}) for value in (0.1, 0.2)]
    few = [cell_of({name: figures(value) for name in ("sft", "dpr")}) for value in (0.1, 0.2)]
    regimes.plot(small, {"all": two, "few": few}, {}, tmp_path)
    assert (tmp_path / "b.png").is_file()
    (tmp_path / "b.png").unlink()
    regimes.plot(small, {"few": few}, {}, tmp_path)
    assert not (tmp_path / "b.png").exists()


def test_figures_survive_their_file() -> None:
    found = CellFigures({"sft": figures(0.5, None, None)}, 0.4, figures(0.1))
    values = {
        "policies": {
            "sft": {"sampled_accuracy": 0.5, "greedy_accuracy": None, "length_tokens": 40.0, "kl_to_sft": None}
        },
        "demonstrations_right": 0.4,
        "start": {"sampled_accuracy": 0.1, "greedy_accuracy": 1.0, "length_tokens": 40.0, "kl_to_sft": 0.0},
    }
    assert CellFigures.of(values) == found


def test_continued_sft_starts_from_the_sft_model_whatever_the_overrides_say(tmp_path: Path) -> None:
    checkpoint = tmp_path / "sft"
    write_known_policy(checkpoint, 0.4)
    given: dict[str, JsonValue] = {"base_model": "org/model", "scratch.layers": 2, "renderer": "chat", "epochs": 3}
    found = regimes_jobs.started_from(checkpoint, given)
    assert found == {"base_model": str(checkpoint), "scratch": None, "renderer": "plain", "epochs": 3}


def test_a_report_of_what_is_finished_leaves_out_regimes_with_a_single_seed(tmp_path: Path) -> None:
    small, reports = study(output_dir=tmp_path, regimes={"a": MIXED, "b": MIXED}, seeds=(1, 2, 3)), list[str]()
    cells = [Cell(small, regime, seed, {}) for regime in "ab" for seed in (1, 2, 3)]
    for one in (cells[0], cells[2], cells[4]):
        one.folder.mkdir(parents=True)
        one.figures.write_text("{}")
    assert regimes.finished_cells(cells, reports.append) == [cells[0], cells[2]]
    assert "2 of 6 cells" in reports[0]
    cells[2].figures.unlink()
    with pytest.raises(ConfigError, match="run the study without it"):
        regimes.finished_cells(cells, reports.append)
    with pytest.raises(ConfigError, match="4 cells of tuning are not finished"):
        regimes.run_cells(cells, small.model_copy(update={"finished_only": True}), "tuning", reports.append)


def test_jobs_run_on_the_device_of_the_study() -> None:
    for values, device in (({}, "cpu"), ({"device": "cuda"}, "cuda")):
        cell = Cell(study(**values), "mixed", 1, {})
        assert regimes_jobs.evaluation_job(cell, "http://127.0.0.1").overrides["device"] == device


def test_jobs_of_several_commits_are_reported(tmp_path: Path) -> None:
    small, reports = study(output_dir=tmp_path), list[str]()
    cells = [Cell(small, "mixed", seed, {}) for seed in (1, 2)]
    for one, commit in zip(cells, ("aaa", "bbb"), strict=True):
        (one.folder / "sft").mkdir(parents=True)
        (one.folder / "sft" / "run.json").write_text(json.dumps({"commit": commit}))
    assert regimes.commits_of(cells[:1], reports.append) == {"aaa": 1}
    assert not reports
    assert regimes.commits_of(cells, reports.append) == {"aaa": 1, "bbb": 1}
    assert "may not be comparable: 1 at aaa, 1 at bbb" in reports[0]


@pytest.mark.parametrize(("checker", "expected"), [("final_answer", 0.5), ("last_number", 1.0), ("exact", None)])
def test_demonstrations_are_judged_as_the_evaluation_judges(checker: str, expected: float | None) -> None:
    rows = (demonstration("1+1?", "#### 2", 2, "x"), demonstration("1+2?", "It is 3.", 3, "x"))
    small = study(evaluate={"held_out_options.checker": checker})
    job = regimes_jobs.evaluation_job(Cell(small, "mixed", 1, {}), "http://127.0.0.1")
    assert regimes_jobs.demonstrations_right(TaskData(rows, rows, rows), job) == expected


def test_a_study_can_be_narrowed_to_some_of_its_regimes() -> None:
    several = {
        "one": {"task": {"name": "additions"}},
        "two": {"task": {"name": "additions"}, "tuned_as": "one"},
        "three": {"task": {"name": "additions"}},
    }
    whole = study(regimes=several)
    assert [*whole.narrowed().regimes] == ["one", "two", "three"]
    assert [*study(regimes=several, only=["three", "one"]).narrowed().regimes] == ["three", "one"]
    with pytest.raises(ValueError, match="only: 'four' is none of the regimes one, two, three"):
        study(regimes=several, only=["four"])
    with pytest.raises(ValueError, match="two uses the values that are chosen in one: add one to only"):
        study(regimes=several, only=["two"])
