"""The tables of Figures 2 and 3."""

from bench.studies import figures_page


def found(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def test_a_figure_has_a_row_for_each_place_at_its_position() -> None:
    figures = {"sampled_accuracy": found(0.5), "greedy_accuracy": found(1.0), "sampled_accuracy_gain": found(0.25)}
    study = {
        "config": {
            "series": {
                "gamma": {"values": [0.95, 1.0], "positions": None, "label": "discount"},
                "reference": {"values": ["base", "at_50"], "positions": [0.0, 0.5], "label": "share"},
            }
        },
        "summary": {
            "mixed": {f"{name}": figures for name in ("gamma_0.95", "gamma_1.0", "reference_base", "reference_at_50")}
        },
        "cells": {"mixed": [{}, {}]},
    }
    blocks = figures_page.blocks(study)
    assert "| mixed | 0.95 | 0.500 [0.400, 0.600] |" in blocks["figure_2"]
    assert "| mixed | 1 |" in blocks["figure_2"]
    assert "| task | share | sampled |" in blocks["figure_3"]
    assert "| mixed | 0.5 |" in blocks["figure_3"]
    assert blocks["figure_3"].endswith("Seeds: mixed 2.")
    assert figures_page.blocks(None)["figure_2"] == "Not measured yet: `make figures` does."
