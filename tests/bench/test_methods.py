"""The rows of methods.json, and the cells of its tables."""

from pathlib import Path
from typing import Any

import pytest

from bench.studies import methods, methods_page
from bench.studies.__main__ import keep_others


def found(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def study() -> dict[str, object]:
    figures = {name: found(0.5) for name in ("sampled_accuracy", "greedy_accuracy", "length_tokens", "kl_to_sft")}
    metrics = ("sampled_accuracy", "greedy_accuracy")
    compared = {"spin": {"interval": found(0.25), "p_holm": 0.04}}
    return {
        "summary": {"mixed": {"dpr": figures, "spin": figures | {"length_tokens": found(33.04)}}},
        "primary": {"mixed": {"differences": dict.fromkeys(metrics, compared)}},
        "rewards": {"mixed": {"spin": {"reward:round_0": {"digit": found(0.75), "min": found(0.625)}, "margin": {}}}},
        "cells": {"mixed": [{}, {}, {}]},
        "tuning": {
            "mixed": {"spin": {"key": "learning_rate", "values": [1], "means": [0.5], "chosen": 1, "on_edge": True}}
        },
    }


def test_a_row_holds_what_a_method_reached_and_how_good_its_reward_is() -> None:
    dpr, spin = methods.rows(study())
    assert (dpr["method"], dpr["dpr_minus_it_sampled_accuracy"], dpr["rewards"]) == ("dpr", None, {})
    assert spin["dpr_minus_it_greedy_accuracy"] == {"interval": found(0.25), "p_holm": 0.04}
    assert spin["rewards"] == {"reward:round_0": {"digit": found(0.75), "min": found(0.625)}, "margin": {}}


def test_the_tables_show_every_method_and_what_was_not_measured() -> None:
    blocks = methods_page.blocks(study())
    row = (
        "| SPIN, three iterations | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] | 33.0 | 0.50 | 0.250 [0.150, 0.350] |"
    )
    assert row in blocks["mixed"]
    assert "3 seeds" in blocks["mixed"]
    assert blocks["additions"] == "Not measured yet: `make methods` does."
    reward = (
        "| mixed | SPIN, three iterations | `reward:round_0` | 0.750 [0.650, 0.850] | - | - | 0.625 [0.525, 0.725] |"
    )
    assert reward in blocks["rewards"]
    assert "margin" not in blocks["rewards"]
    assert "| 1 (edge) |" in blocks["tuning"]
    assert set(methods_page.blocks(None).values()) == {"Not measured yet: `make methods` does."}


def test_a_run_of_another_length_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n{"step": 1}\n')
    with pytest.raises(RuntimeError, match="logged 1 losses, not 20"):
        methods.losses(tmp_path)


def test_a_regime_that_is_run_alone_replaces_its_own_figures_and_keeps_the_others() -> None:
    def of(commit: str, **cells: int) -> dict[str, Any]:
        one = {regime: {"of": value} for regime, value in cells.items()}
        study = {key: dict(one) for key in ("tuning", "cells", "summary", "primary", "boundary", "rewards")}
        previews = [{"regime": regime, "of": value} for regime, value in cells.items()]
        config = {"regimes": dict(one)}
        where = {"machine": {"cores": 2}, "versions": {"torch": "2"}}
        return {"study": study | {"preview": previews, "config": config}, "study_commits": {commit: 3}, **where}

    earlier = of("old", mixed=1, additions=2) | {"kept": {"mixed": {"commit": "older"}, "gone": {"commit": "older"}}}
    now = of("new", additions=3)["study"]
    assert keep_others(now, earlier) == {"mixed": {"commit": "older"}}
    both = {"additions": {"of": 3}, "mixed": {"of": 1}}
    assert (now["cells"], now["summary"], now["config"]["regimes"]) == (both, both, both)
    assert now["preview"] == [{"regime": "additions", "of": 3}, {"regime": "mixed", "of": 1}]
    later = of("newest", additions=4)["study"]
    del earlier["kept"]
    source = {"commit": "old", "machine": {"cores": 2}, "versions": {"torch": "2"}}
    assert keep_others(later, earlier) == {"mixed": source}
