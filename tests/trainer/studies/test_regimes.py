"""The regimes study without its jobs: what is tuned, matched, compared and refused."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import pytest
from dense_reward_trainer.configs.base import config_path, load_config
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.studies import regimes, regimes_jobs
from dense_reward_trainer.studies.regimes_cell import Cell, evaluated_policies
from dense_reward_trainer.studies.regimes_config import AnyPolicy, SweepConfig, controls, free_controls
from dense_reward_trainer.studies.regimes_figures import CellFigures, Figures, Verdict, at_matched_kl
from dense_reward_trainer.studies.regimes_preview import check_preview
from dense_reward_trainer.studies.regimes_table import (
    compare_primary,
    format_comparison,
    format_previews,
    format_table,
    place,
    summarise,
)
from dense_reward_trainer.studies.regimes_tuning import choice_lines, choose, tuned, variant_name, variants
from known_policies import write_known_policy
from pydantic import JsonValue, ValidationError

MIXED = {"task": {"name": "mixed_demonstrators"}}
POLICIES: dict[str, dict[str, object]] = {
    "dpr": {"kind": "dpr", "reference": "base", "grid": {"learning_rate": [1e-4, 2e-4, 4e-4]}},
    "continued": {"kind": "sft", "matched_flops": "dpr", "grid": {"learning_rate": [1e-4, 1e-3]}},
    "cold": {"kind": "sampled", "grid": {"temperature": [1.0, 0.7, 0.4]}},
    "tilted": {"kind": "sampled", "options": {"tilt": {"reference": "base", "strength": 1.0}}},
    "best": {"kind": "sampled", "options": {"choose": {"samples": 8, "by": "reward", "pair": "base"}}},
    "majority": {"kind": "sampled", "options": {"choose": {"samples": 8, "by": "majority"}}},
    "dpr_log": {"kind": "dpr", "reference": "base", "dpr": {"signal": "sft_logprob"}},
    "as_far": {"kind": "matched_kl", "to": "dpr", "values": [1.0, 0.7, 0.4]},
}


MILESTONES: dict[str, object] = {"milestones": {"base": 0.0, "reference": 0.5}}
SERIES: dict[str, object] = {"of": "dpr_log", "key": "kl_coefficient", "values": [0.5, 1.0], "label": "b"}


def config(**changes: object) -> SweepConfig:
    values = {
        "output_dir": "unused",
        "regimes": {"mixed": MIXED},
        "seeds": (1, 2),
        "sft": MILESTONES,
        "policies": POLICIES,
        "tuning": {"seeds": [1000]},
        "primary": "dpr",
    }
    return SweepConfig.model_validate(values | changes)


def option(policy: AnyPolicy, name: str) -> object:
    return policy.model_dump()[name]


def figures(sampled: float, greedy: float | None = 1.0, kl: float | None = 0.0) -> Figures:
    return Figures(sampled, greedy, 40.0, kl)


def cell(policies: Mapping[str, Figures], right: float | None = 0.4, start: float = 0.1) -> CellFigures:
    return CellFigures(dict(policies), right, figures(start))


def test_a_dpr_token_costs_what_its_parts_cost() -> None:
    assert regimes_jobs.dpr_flops_per_token(1) == 2 + 2 + 2 * 2 + 6
    assert regimes_jobs.matched_sft_steps(dpr_tokens=600, updates_per_batch=1, sft_tokens_per_step=100) == 14
    assert regimes_jobs.matched_sft_steps(dpr_tokens=600, updates_per_batch=4, sft_tokens_per_step=100) == 32
    assert regimes_jobs.matched_sft_steps(dpr_tokens=1, updates_per_batch=1, sft_tokens_per_step=100) == 1


def test_tokens_of_an_sft_run_are_counted_across_a_resumption() -> None:
    counts = [(10, 1000), (20, 1900), (30, 900), (40, 1800), (50, None)]
    lines: list[dict[str, float | None]] = [{"step": step, "num_tokens": count} for step, count in counts if count]
    assert regimes_jobs.tokens_per_step([*lines, {"step": 50.0, "loss": 0.1}]) == (1900 + 900) / 30
    with pytest.raises(JobError, match=r"lower sft.log_every_steps"):
        regimes_jobs.tokens_per_step([{"step": 50.0, "loss": 0.1}])


def test_a_policy_at_a_matched_kl_is_interpolated_between_its_values() -> None:
    curve = [figures(0.5, kl=0.0), figures(0.7, kl=1.0), figures(0.9, kl=3.0)]
    assert at_matched_kl(curve, 0.5).sampled_accuracy == pytest.approx(0.6)
    assert at_matched_kl(curve, 2.0) == figures(0.8, kl=2.0)
    assert at_matched_kl(curve, 9.0) == curve[-1]
    assert at_matched_kl(curve, -0.1) == curve[0]
    with pytest.raises(ValueError, match="a KL can only be matched"):
        at_matched_kl(curve, None)


def test_every_value_of_a_grid_is_tried_and_the_best_one_is_used() -> None:
    study = config()
    tried = variants(study.policies)
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
    two = [cell({name: figures(value) for name, value in accuracies.items()}) for _ in range(2)]
    choices = choose(study.policies, two, "sampled_accuracy")
    assert (choices["dpr"].chosen, choices["dpr"].on_edge) == (2e-4, False)
    assert (choices["cold"].chosen, choices["cold"].on_edge) == (0.4, True)
    assert choices["continued"].chosen == 1e-4
    assert any("cold: temperature = 0.4 of 3 tried" in line and "edge" in line for line in choice_lines(choices))
    final = tuned(study.all_policies, choices)
    assert option(final["dpr"], "dpr") == {"learning_rate": 2e-4}
    assert not any(policy.grid for policy in final.values())
    assert option(final["continued"], "matched_flops") == "dpr"


def test_nested_options_are_tuned_too() -> None:
    tilted = {**POLICIES["tilted"], "grid": {"tilt.strength": [0.5, 2.0]}}
    found = variants(config(policies=POLICIES | {"tilted": tilted}).policies)
    assert option(found["tilted--1"], "options") == {"tilt": {"reference": "base", "strength": 2.0}}


def test_policies_that_need_the_log_ratio_are_no_controls() -> None:
    using = {name for name, policy in config().all_policies.items() if policy.uses_reward}
    assert using == {"dpr", "tilted", "best"}
    far = {"far": {"kind": "sampled", "options": {"extrapolate": {"base": "base", "strength": 1.0}}}}
    names, alone = controls(config(policies=POLICIES | far).all_policies)
    assert set(names) - set(alone) == {"far"}


def test_a_sample_of_a_checkpoint_that_was_trained_on_the_reward_is_no_control() -> None:
    more: dict[str, object] = {
        "dpr_cold": {"kind": "sampled", "options": {"checkpoint": "dpr", "temperature": 0.5}},
        "log_cold": {"kind": "sampled", "options": {"checkpoint": "dpr_log", "temperature": 0.5}},
        "half_way": {"kind": "sampled", "options": {"checkpoint": "reference"}},
        "far": {"kind": "sampled", "options": {"extrapolate": {"base": "base", "strength": 1.0}}},
    }
    study = config(policies=POLICIES | more)
    names, alone = controls(study.all_policies)
    assert "dpr_cold" not in names
    assert {"log_cold", "half_way"} <= set(names)
    assert "log_cold" in alone
    assert "half_way" not in alone
    assert free_controls(study.all_policies) == ["cold"]


def test_checkpoints_are_named_by_what_the_cell_trains() -> None:
    study = config()
    here = Cell(study, "mixed", 1, study.all_policies)
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
    study = config(policies=policies, series=series | {"place": place_series}, tuning=None)
    found = study.all_policies
    assert list(found) == ["dpr", "gamma_0.9", "gamma_1.0", "place_base", "place_reference"]
    assert option(found["gamma_0.9"], "dpr") == {"gamma": 0.9}
    assert option(found["place_reference"], "reference") == "reference"


CELLS = [
    cell({"sft": figures(0.5), "dpr": figures(0.6), "control": figures(0.55), "majority": figures(0.58, None, None)}),
    cell({"sft": figures(0.7), "dpr": figures(0.9), "control": figures(0.75), "majority": figures(0.78, None, None)}),
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
    assert place([cell({"sft": figures(0.1)}, right=None)], "sft") is None


@pytest.mark.parametrize(
    ("reached", "outcome"), [(0.515, "no"), (0.3, "no"), (0.6, "control"), (0.715, "control"), (0.73, "gain")]
)
def test_a_verdict_is_right_if_training_did_what_it_said(reached: float, outcome: str) -> None:
    policies = {name: figures(0.5, greedy=0.1) for name in ("sft", "tilted", "majority", "dpr")}
    policies |= {"cold": figures(0.7, greedy=0.1), "dpr_early": figures(reached)}
    study = config(policies=POLICIES | {"dpr_early": {"kind": "dpr", "reference": "early"}})
    for said in ("gain", "control", "no", "unknown"):
        found = CellFigures(policies, None, None, Verdict(said, "early", "because"))
        check = check_preview("mixed", 1, found, study.all_policies, "dpr")
        assert check is not None
        assert (check.policy, check.outcome, check.right) == ("dpr_early", outcome, said == outcome)
        assert check.on_its_reference
        assert "of 1 verdicts" in format_previews([check])
    assert check_preview("mixed", 1, CellFigures(policies, None, None), study.all_policies, "dpr") is None


def test_a_verdict_on_a_reference_that_was_not_trained_on_is_marked() -> None:
    policies = {name: figures(0.5) for name in ("sft", "cold", "dpr")}
    study = config()
    for reference, marked in (("half", True), ("base", False), (None, False)):
        found = CellFigures(policies, None, None, Verdict("no", reference, "because"))
        check = check_preview("mixed", 1, found, study.all_policies, "dpr")
        assert check is not None
        assert check.policy == "dpr"
        assert ("dpr (other reference)" in format_previews([check])) == marked


def test_a_series_is_plotted_for_the_regimes_that_have_it(tmp_path: Path) -> None:
    regimes_of_two: dict[str, object] = {"all": MIXED, "few": MIXED | {"policies": ["dpr"]}}
    study = config(output_dir=tmp_path, series={"b": SERIES}, regimes=regimes_of_two)
    names = ("sft", "dpr", "b_0.5", "b_1.0")
    two = [cell({name: figures(value) for name in names}) for value in (0.1, 0.2)]
    few = [cell({name: figures(value) for name in ("sft", "dpr")}) for value in (0.1, 0.2)]
    regimes.plot(study, {"all": two, "few": few}, {}, tmp_path)
    assert (tmp_path / "b.png").is_file()
    (tmp_path / "b.png").unlink()
    regimes.plot(study, {"few": few}, {}, tmp_path)
    assert not (tmp_path / "b.png").exists()


def test_figures_survive_their_file() -> None:
    found = CellFigures({"sft": figures(0.5, None, None)}, 0.4, figures(0.1), Verdict("no", None, "because"))
    values = {
        "policies": {
            "sft": {"sampled_accuracy": 0.5, "greedy_accuracy": None, "length_tokens": 40.0, "kl_to_sft": None}
        },
        "demonstrations_right": 0.4,
        "start": {"sampled_accuracy": 0.1, "greedy_accuracy": 1.0, "length_tokens": 40.0, "kl_to_sft": 0.0},
        "preview": {"verdict": "no", "reference": None, "reason": "because"},
    }
    assert CellFigures.of(values) == found


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"primary": "none"}, "primary: 'none' is none of the policies"),
        ({"policies": {"sft": {"kind": "sampled"}}, "primary": "sft"}, "reserved for the study itself"),
        ({"seeds": (1, 1)}, "list each seed once"),
        ({"seeds": (1,)}, "seeds"),
        ({"tuning": {"seeds": [1]}}, "tuning.seeds: 1 is also reported"),
        ({"tuning": None}, "has a grid, but tuning is null"),
        ({"labelled": 100}, "set both or neither"),
        ({"regimes": {"a": MIXED | {"policies": ["dpr", "dqr"]}}}, "'dqr' is none of the policies"),
        ({"regimes": {"a": MIXED | {"policies": ["dpr", "as_far"], "primary": "cold"}}}, "'cold' is none"),
        ({"regimes": {"a": MIXED | {"policies": ["continued", "cold"], "primary": "cold"}}}, "'dpr' is none"),
        ({"regimes": {"a": MIXED | {"tuned_as": "b"}}}, "'b' is no regime with its own tuning"),
        ({"regimes": {"a": MIXED | {"seeds": [3]}}}, "seeds"),
        ({"policies": POLICIES | {"more": {"kind": "sft", "matched_flops": "less"}}}, "'less' is none of the policies"),
        ({"policies": POLICIES | {"two": {"kind": "sampled", "grid": {"a": [1], "b": [2]}}}}, "at most 1"),
        ({"series": {"s": {"of": "cold", "key": "gamma", "values": [1, 2], "label": ""}}}, "no policy of kind dpr"),
    ],
)
def test_a_study_that_means_nothing_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        config(**changes)


def test_checkpoints_that_no_run_leaves_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"policies.dpr: regime mixed has no checkpoint 'base', only reference:"):
        regimes.check_cells(config(sft={"milestones": {"reference": 0.5}}))
    wrong = {"of_base": {"kind": "sampled", "options": {"extrapolate": {"base": "bse", "strength": 1.0}}}}
    with pytest.raises(ConfigError, match=r"policies.of_base: regime mixed has no checkpoint 'bse'"):
        regimes.check_cells(config(policies=POLICIES | wrong))


CHECKED: dict[str, tuple[dict[str, object], str]] = {
    "one seed for all": ({"sft": MILESTONES | {"seed": 3}}, "sft: seed is set by the study"),
    "other data": ({"regimes": {"a": MIXED | {"base": {"data.source": "x"}}}}, "regimes.a.base: data.source is set by"),
    "other policies": ({"evaluate": {"policies.sft.temperature": 0.5}}, "evaluate: policies.sft.temperature is set by"),
    "other start": ({"policies": POLICIES | {"c": {"kind": "sft", "sft": {"scratch.layers": 2}}}}, "c: scratch.layers"),
    "other FLOPs": (
        {"policies": POLICIES | {"c": {"kind": "sft", "matched_flops": "dpr", "sft": {"epochs": 2}}}},
        "policies.c: epochs is set by",
    ),
    "a milestone's name": (
        {"policies": POLICIES | {"reference": {"kind": "dpr", "reference": "base"}}},
        "policies.reference: a milestone of SFT has this name too",
    ),
    "FLOPs of a sampled policy": (
        {"policies": POLICIES | {"c": {"kind": "sft", "matched_flops": "cold"}}},
        "policies.c.matched_flops: cold is no policy of kind dpr",
    ),
    "FLOPs that a grid changes": (
        {"policies": POLICIES | {"dpr": POLICIES["dpr"] | {"grid": {"steps": [1, 2]}}}},
        r"policies.continued is tuned with the FLOPs of dpr, whose grid changes them \(steps\)",
    ),
    "the KL of a choice": (
        {"policies": POLICIES | {"as_far": POLICIES["as_far"] | {"to": "best"}}},
        "policies.as_far: a KL can be matched between policies that sample one answer",
    ),
    "the KL of a matched KL": (
        {"policies": POLICIES | {"further": POLICIES["as_far"] | {"to": "as_far"}}},
        "policies.further: a KL can be matched",
    ),
    "a series of a tuned policy": ({"series": {"s": SERIES | {"of": "dpr"}}}, "series.s.of: dpr has a grid"),
    "two points of one name": ({"series": {"s": SERIES | {"values": [0.9, 0.9]}}}, "would be called s_0.9"),
    "a point without a place": (
        {"series": {"s": SERIES | {"key": "returns", "values": ["min", "total"]}}},
        "series.s: its values are no numbers: give positions",
    ),
    "a point that is no folder": ({"series": {"s": SERIES | {"values": ["a/b", "c"]}}}, "'a/b' cannot be part of a"),
    "a picture of the study": ({"series": {"sweep": SERIES}}, "choose a name without dots"),
    "a grid without effect": (
        {"regimes": {"a": MIXED | {"dpr": {"learning_rate": 1e-4}}}},
        "regimes.a.dpr: learning_rate would replace every value of policies.dpr.grid",
    ),
    "a series without effect": (
        {"regimes": {"a": MIXED | {"dpr": {"kl_coefficient": 1.0}}}, "series": {"s": SERIES}},
        "regimes.a.dpr: kl_coefficient would replace every value of series.s",
    ),
    "a grid that is tuned nowhere": (
        {
            "regimes": {
                "a": MIXED | {"policies": ["dpr"]},
                "b": MIXED | {"policies": ["dpr", "cold"], "tuned_as": "a"},
            }
        },
        "regimes.b.tuned_as: a does not have cold",
    ),
    "a control that is paid the reward": (
        {"dpr": {"signal": "sft_logprob"}},
        "policies.dpr: regime mixed or recipe arithmetic_dpr sets signal to sft_logprob",
    ),
}


@pytest.mark.parametrize(("changes", "complaint"), CHECKED.values(), ids=CHECKED)
def test_a_study_whose_figures_would_mislead_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        regimes.check_cells(config(**changes))


def test_a_study_that_is_right_passes_all_checks() -> None:
    regimes.check_cells(config(series={"s": SERIES}))


@pytest.mark.parametrize("name", ["base", "preview", "log.txt"])
def test_a_name_that_the_study_uses_itself_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="reserved for the study itself"):
        config(policies=POLICIES | {name: {"kind": "dpr", "reference": "base"}})


@pytest.mark.parametrize("recipe", ["evidence_sweep", "evidence_full_sweep", "figures_sweep"])
def test_the_recipe_is_what_the_jobs_take(recipe: str) -> None:
    study = load_config(SweepConfig, config_path(recipe))
    reported = {seed for regime in study.regimes for seed in study.seeds_of(regime)}
    assert not {0, 1, 2}.intersection(reported), "seeds that were looked at while options were chosen"
    regimes.check_cells(study)


def test_a_missing_submitit_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    study = config(output_dir=tmp_path, submitit={"timeout_min": 5})
    with pytest.raises(ConfigError, match="pip install submitit"):
        regimes.run_cells([Cell(study, "mixed", 1, {})], study, "seeds", print)


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
    study = config(output_dir=tmp_path, submitit={"cluster": "debug", "timeout_min": 5})
    cells = [Cell(study, "mixed", seed, {}) for seed in (1, 2)]
    found = cell({"sft": figures(0.5)})

    def leave_figures(one: Cell) -> None:
        one.folder.mkdir(parents=True)
        one.figures.write_text(json.dumps(asdict(found)))

    monkeypatch.setattr(regimes, "logged_cell", leave_figures)
    assert regimes.run_cells(cells, study, "seeds", print) == [found, found]


@pytest.mark.usefixtures("cluster")
def test_a_job_of_a_cluster_that_leaves_no_figures_is_not_run_again_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = config(output_dir=tmp_path, submitit={"timeout_min": 5})
    monkeypatch.setattr(regimes, "logged_cell", lambda _: None)
    with pytest.raises(
        JobError, match=r"mixed, seed 1 ended, but .*figures.json is not here: put output_dir on a file"
    ):
        regimes.run_cells([Cell(study, "mixed", 1, {})], study, "seeds", print)

    def fail(_: Cell) -> None:
        raise JobError("sft failed with exit code 2")

    monkeypatch.setattr(regimes, "logged_cell", fail)
    with pytest.raises(JobError, match=r"mixed, seed 1: sft failed with exit code 2; more in .*log.txt"):
        regimes.run_cells([Cell(study, "mixed", 1, {})], study, "seeds", print)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("options", "complaint"), [({"cluster": "moon"}, "named moon"), ({"minutes": 5}, "Unknown argument.*minutes")]
)
def test_options_that_submitit_refuses_are_named(tmp_path: Path, options: dict[str, object], complaint: str) -> None:
    study = config(output_dir=tmp_path, submitit=options)
    with pytest.raises(ConfigError, match=f"submitit refuses these options: .*{complaint}"):
        regimes.run_cells([Cell(study, "mixed", 1, {})], study, "seeds", print)


def test_continued_sft_starts_from_the_sft_model_whatever_the_overrides_say(tmp_path: Path) -> None:
    checkpoint = tmp_path / "sft"
    write_known_policy(checkpoint, 0.4)
    given: dict[str, JsonValue] = {"base_model": "org/model", "scratch.layers": 2, "renderer": "chat", "epochs": 3}
    found = regimes_jobs.started_from(checkpoint, given)
    assert found == {"base_model": str(checkpoint), "scratch": None, "renderer": "plain", "epochs": 3}


def test_jobs_of_several_commits_are_reported(tmp_path: Path) -> None:
    study, reports = config(output_dir=tmp_path), list[str]()
    cells = [Cell(study, "mixed", seed, {}) for seed in (1, 2)]
    for one, commit in zip(cells, ("aaa", "bbb"), strict=True):
        (one.folder / "sft").mkdir(parents=True)
        (one.folder / "sft" / "run.json").write_text(json.dumps({"commit": commit}))
    assert regimes.commits_of(cells[:1], reports.append) == {"aaa": 1}
    assert not reports
    assert regimes.commits_of(cells, reports.append) == {"aaa": 1, "bbb": 1}
    assert "may not be comparable: 1 at aaa, 1 at bbb" in reports[0]
