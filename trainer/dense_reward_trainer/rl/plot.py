"""A DPR run as one picture: reward, KL to the SFT model, length and held-out accuracy over the steps.

Reads the lines of metrics.jsonl; must not know how training works.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dense_reward_trainer.runs.pictures import without_data, write_picture

Lines = Sequence[Mapping[str, float | None]]
# title of a panel -> (key, label, key of its standard error)
PANELS: Mapping[str, Sequence[tuple[str, str, str | None]]] = {
    "reward (nats per response)": (("reward_sum", "signal", None), ("paid_sum", "with KL penalty", None)),
    "KL to SFT (nats per response)": (
        ("kl_to_sft", "rollouts", None),
        ("held_out_kl_to_sft", "held out", "held_out_kl_to_sft_se"),
    ),
    "length (tokens)": (
        ("length_mean", "rollouts", None),
        ("held_out_length_tokens", "held out", "held_out_length_tokens_se"),
    ),
    "held-out accuracy": (
        ("held_out_greedy_accuracy", "greedy", "held_out_greedy_accuracy_se"),
        ("held_out_sampled_accuracy", "sampled", "held_out_sampled_accuracy_se"),
    ),
}

# title of a panel -> why it can have no data
EMPTY: Mapping[str, str] = {
    "held-out accuracy": "no held-out prompt has a known answer: set held_out, and give its rows a final answer",
}


def plot_run(lines: Lines, path: Path) -> None:
    """Write the picture as a PNG; error bars are standard errors."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for key, label, error_key in curves:
            _draw(axes, lines, key, label, error_key)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        else:
            without_data(axes, EMPTY.get(title, "no step was logged"))
    write_picture(figure, path)


def _draw(axes: Axes, lines: Lines, key: str, label: str, error_key: str | None) -> None:
    points = [(line["step"], line[key], line.get(error_key or "")) for line in lines if line.get(key) is not None]
    if not points:
        return
    steps, values, errors = zip(*points, strict=True)
    if error_key is None:
        axes.plot(steps, values, label=label)
    else:
        bars = [math.nan if error is None else error for error in errors]  # a single prompt has no standard error
        axes.errorbar(steps, values, yerr=bars, label=label, marker=".", capsize=2)
