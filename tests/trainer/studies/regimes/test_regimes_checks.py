"""Regimes studies that are refused before anything runs."""

from pathlib import Path

import pytest
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.studies.regimes import study as regimes
from dense_reward_trainer.studies.regimes.cell import Cell
from dense_reward_trainer.studies.regimes.config import SweepConfig
from dense_reward_trainer.studies.regimes.jobs import launcher_of
from pydantic import ValidationError
from regimes_study import MILESTONES, MIXED, POLICIES, SERIES, study


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
        study(**changes)


def test_checkpoints_that_no_run_leaves_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"policies.dpr: regime mixed has no checkpoint 'base', only reference:"):
        regimes.check_cells(study(sft={"milestones": {"reference": 0.5}}))
    wrong = {"of_base": {"kind": "sampled", "options": {"extrapolate": {"base": "bse", "strength": 1.0}}}}
    with pytest.raises(ConfigError, match=r"policies.of_base: regime mixed has no checkpoint 'bse'"):
        regimes.check_cells(study(policies=POLICIES | wrong))


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
    "an unknown option of the base": ({"base": {"epoch": 2}}, "unknown key epoch: did you mean epochs"),
    "an unknown option of continued SFT": (
        {"policies": POLICIES | {"more": {"kind": "sft", "sft": {"learning_rat": 1}}}},
        "unknown key learning_rat: did you mean learning_rate",
    ),
    "an unknown option of a sampled policy": (
        {"policies": POLICIES | {"hot": {"kind": "sampled", "options": {"temprature": 2}}}},
        "unknown key policies.hot.temprature: did you mean policies.hot.temperature",
    ),
    "a grid of no option": (
        {"policies": POLICIES | {"hot": {"kind": "sampled", "grid": {"top_p": [0.5, 1.5]}}}},
        "policies.hot--1.top_p: Input should be less than or equal to 1",
    ),
    "two ways to find an answer": (
        {"preview": {}, "labelled": 5, "evaluate": {"held_out_options.checker": "last_number"}},
        "preview finds answers by final_answer, evaluate by last_number: set preview.checker and",
    ),
    "another start of self-play": (
        {"policies": POLICIES | {"spin": {"kind": "irft", "options": {"policy": "x"}}}},
        "policies.spin: policy is set by the study",
    ),
    "one seed for all of RFT": (
        {"policies": POLICIES | {"rft": {"kind": "rft", "grid": {"seed": [1, 2]}}}},
        "policies.rft: seed is set by the study",
    ),
    "an unknown option of RFT": (
        {"policies": POLICIES | {"rft": {"kind": "rft", "options": {"head.epoch": 2}}}},
        "unknown key head.epoch: did you mean head.epochs",
    ),
    "RFT without a policy": (
        {"policies": POLICIES | {"rft": {"kind": "rft", "options": {"rounds": 1, "policy_steps": None}}}},
        "policies.rft: policy_steps is null, so rft would train no policy",
    ),
    "a control that is paid the reward": (
        {"dpr": {"signal": "sft_logprob"}},
        "policies.dpr: regime mixed or recipe arithmetic_dpr sets signal to sft_logprob",
    ),
}


@pytest.mark.parametrize(("changes", "complaint"), CHECKED.values(), ids=CHECKED)
def test_a_study_whose_figures_would_mislead_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        regimes.check_cells(study(**changes))


def test_a_study_that_is_right_passes_all_checks() -> None:
    regimes.check_cells(study(series={"s": SERIES}))


@pytest.mark.parametrize("name", ["base", "preview", "log.txt"])
def test_a_name_that_the_study_uses_itself_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="reserved for the study itself"):
        study(policies=POLICIES | {name: {"kind": "dpr", "reference": "base"}})


def test_processes_of_a_run_need_an_engine_that_uses_them() -> None:
    with pytest.raises(ConfigError, match=r"launch: policies.dpr has engine own, which runs in one process: set trl"):
        regimes.check_cells(study(launch=2))


def test_jobs_that_train_are_launched_and_others_are_not() -> None:
    cell = Cell(study(launch=8, strategy="fsdp2"), "mixed", 1, {})
    program, *words = launcher_of(cell, "dpr", ["dpr", "dpr_full", "seed=1"])
    assert Path(program).name == "accelerate"
    assert words[-5:] == ["-m", "dense_reward_trainer.cli", "dpr", "dpr_full", "seed=1"]
    assert "--num_processes 8" in " ".join(words)
    assert launcher_of(cell, "evaluate", ["evaluate"]) == []
    assert launcher_of(Cell(study(), "mixed", 1, {}), "sft", ["sft"]) == []


@pytest.mark.parametrize(
    "recipe",
    [
        "evidence_sweep",
        "evidence_few_sweep",
        "evidence_full_sweep",
        "figures_sweep",
        "gsm8k_sweep",
        "large_scale_sweep",
        "large_scale_sweep_tiny",
        "methods",
    ],
)
def test_the_recipe_is_what_the_jobs_take(recipe: str) -> None:
    small = load_config(SweepConfig, config_path(recipe))
    reported = {seed for regime in small.regimes for seed in small.seeds_of(regime)}
    assert not {0, 1, 2}.intersection(reported), "seeds that were looked at while options were chosen"
    regimes.check_cells(small)
