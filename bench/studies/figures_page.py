"""The tables of the paper's Figures 2 and 3 in docs/results.md, from bench/results/figures.json."""

from bench.studies.evidence import Record
from bench.studies.evidence_page import interval, unfinished
from bench.tables import table

# series of the recipe -> the block of the page
SERIES = {"gamma": "figure_2", "reference": "figure_3"}
METRICS = ("sampled_accuracy", "greedy_accuracy")


def blocks(study: Record | None) -> dict[str, str]:
    """A table for each figure; None: the study was not run."""
    if study is None:
        return dict.fromkeys(SERIES.values(), unfinished("figures"))
    return {block: series_block(study, series) for series, block in SERIES.items()}


def series_block(study: Record, series: str) -> str:
    """Accuracies along a series, and the difference to the SFT model, paired over the seeds, on each task."""
    config = study["config"]["series"][series]
    places = config["positions"] or config["values"]
    rows = [
        [
            task,
            f"{place:g}",
            *(interval(summary[name][metric]) for metric in METRICS),
            interval(summary[name]["sampled_accuracy_gain"]),
        ]
        for task, summary in study["summary"].items()
        for place, name in zip(places, (f"{series}_{value}" for value in config["values"]), strict=True)
    ]
    seeds = ", ".join(f"{task} {len(cells)}" for task, cells in study["cells"].items())
    head = ["task", config["label"], "sampled", "greedy", "minus SFT, sampled"]
    return f"{table(head, rows)}\n\nSeeds: {seeds}."
