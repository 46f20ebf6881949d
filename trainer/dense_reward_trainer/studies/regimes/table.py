"""The regimes study as numbers and text: means over seeds, and the primary policy compared with every other one.

Must not know jobs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.paired import Comparison, compare, in_words, paired_interval, share_interval
from dense_reward_trainer.studies.regimes.figures import CellFigures
from dense_reward_trainer.studies.regimes.preview import PreviewCheck
from dense_reward_trainer.text_table import aligned

METRICS = {"sampled_accuracy": "sampled accuracy", "greedy_accuracy": "greedy accuracy"}
OTHERS = {"length_tokens": "length", "kl_to_sft": "KL to SFT"}
Cells = Sequence[CellFigures]


@dataclass(frozen=True, slots=True)
class PrimaryResult:
    """The primary policy minus every other one, within each seed, by metric; p-values with Holm's correction.

    `best_control`: the control with the highest mean over these very seeds, which favours the control.
    `best_of_one_model`: the same among the controls that need the SFT model alone.
    """

    best_control: dict[str, str]
    best_of_one_model: dict[str, str]
    differences: dict[str, dict[str, Comparison]]


@dataclass(frozen=True, slots=True)
class Place:
    """One regime on the boundary's axis: quality of the demonstrations less that of the start, and the gain over SFT.

    Qualities are shares of right answers: of the demonstrations, and of samples of the model that SFT starts from.
    """

    shift: Interval
    gain: Interval


def summarise(cells: Cells) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and interval over seeds, by policy and figure. `..._gain`: difference to the SFT model of the same seed."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for policy in cells[0].policies:
        summary[policy] = {}
        for name in (*METRICS, *OTHERS):
            values = [getattr(cell.policies[policy], name) for cell in cells]
            if None in values:
                continue
            found = share_interval(values) if name in METRICS else paired_interval(values)
            summary[policy][name] = asdict(found)
        for name in METRICS:
            gains = differences(cells, policy, "sft", name)
            summary[policy][f"{name}_gain"] = asdict(paired_interval(gains))
    return summary


def differences(cells: Cells, policy: str, other: str, metric: str) -> list[float]:
    """The accuracy of one policy less that of another, in each seed."""
    return [cell.policies[policy].accuracy(metric) - cell.policies[other].accuracy(metric) for cell in cells]


def compare_primary(cells: Cells, primary: str, controls: Sequence[str], one_model: Sequence[str]) -> PrimaryResult:
    """The primary policy against all others.

    `controls` do not use the reward; of these, `one_model` need the SFT model alone.
    """
    others = [name for name in cells[0].policies if name != primary]
    return PrimaryResult(
        {metric: _best(cells, controls, metric) for metric in METRICS},
        {metric: _best(cells, one_model, metric) for metric in METRICS},
        {
            metric: compare({other: differences(cells, primary, other, metric) for other in others})
            for metric in METRICS
        },
    )


def _best(cells: Cells, names: Sequence[str], metric: str) -> str:
    """The policy with the highest mean; the first of equal ones."""
    return max(names, key=lambda name: sum(cell.policies[name].accuracy(metric) for cell in cells))


def place(cells: Cells, primary: str, metric: str = "sampled_accuracy") -> Place | None:
    """Where a regime lies on the boundary's axis; None if the quality of its demonstrations or its start is unknown."""
    shifts = [
        cell.demonstrations_right - cell.start.sampled_accuracy
        for cell in cells
        if cell.demonstrations_right is not None and cell.start is not None
    ]
    if len(shifts) < len(cells):
        return None
    return Place(paired_interval(shifts), paired_interval(differences(cells, primary, "sft", metric)))


def format_table(regimes: Mapping[str, Cells]) -> str:
    """One line for every policy of every regime: means, intervals in brackets, and the gain in sampled accuracy."""
    rows = [["regime", "policy", *METRICS.values(), *OTHERS.values(), "gain in sampled accuracy"]]
    for regime, cells in regimes.items():
        for policy, figures in summarise(cells).items():
            names = (*METRICS, *OTHERS, "sampled_accuracy_gain")
            rows.append([regime, policy, *(_cell(figures.get(name)) for name in names)])
    return aligned(rows)


def format_comparison(regimes: Mapping[str, PrimaryResult], primary: Mapping[str, str]) -> str:
    """For every regime and metric, its primary policy minus the best control and minus the SFT model."""
    rows = [["regime", "metric", "primary", "minus", "difference", "p, Holm"]]
    for regime, result in regimes.items():
        for metric, title in METRICS.items():
            notes = {"sft": ""}
            notes[result.best_of_one_model[metric]] = " (best control of one model)"
            notes[result.best_control[metric]] = " (best control)"
            for other, note in notes.items():
                one = result.differences[metric][other]
                rows.append([regime, title, primary[regime], other + note, in_words(one.interval), f"{one.p_holm:.2g}"])
    return aligned(rows)


def format_boundary(places: Mapping[str, Place]) -> str:
    """The gain of every regime, by the quality of its demonstrations less that of its start."""
    rows = [["regime", "demonstrations - start", "gain in sampled accuracy"]]
    ordered = sorted(places.items(), key=lambda pair: pair[1].shift.value)
    rows += [[name, in_words(one.shift), in_words(one.gain)] for name, one in ordered]
    return aligned(rows)


def format_previews(previews: Sequence[PreviewCheck]) -> str:
    """Every verdict of the job preview, what training then did, and how many verdicts were right."""
    rows = [["regime", "seed", "reference", "verdict", "over SFT", "over a control", "outcome", ""]]
    rows += [
        [
            one.regime,
            str(one.seed),
            one.reference,
            one.verdict.verdict,
            f"{one.over_sft:+.3f}",
            f"{one.over_control:+.3f}",
            one.outcome,
            "right" if one.right else "wrong",
        ]
        for one in previews
    ]
    return f"{aligned(rows)}\npreview: {sum(one.right for one in previews)} of {len(previews)} verdicts were right"


def summarise_rewards(cells: Cells) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Mean and interval over seeds of each AUROC: by the run that left the reward, column, and kind of comparison."""
    return {
        source: {
            column: {
                name: asdict(share_interval([cell.rewards[source][column][name] for cell in cells]))
                for name in measured
                if all(name in cell.rewards[source][column] for cell in cells)
            }
            for column, measured in columns.items()
        }
        for source, columns in cells[0].rewards.items()
    }


def format_rewards(regimes: Mapping[str, Cells]) -> str:
    """How good every reward is in every regime, and the signals of the SFT model alone; empty if none was measured."""
    found = {regime: summarise_rewards(cells) for regime, cells in regimes.items()}
    measured = [one for sources in found.values() for columns in sources.values() for one in columns.values()]
    names = list(dict.fromkeys(name for one in measured for name in one))
    rows = [["regime", "training", "signal", *names]]
    for regime, sources in found.items():
        for source, columns in sources.items():
            for column, one in columns.items():
                rows.append([regime, source, column, *(_cell(one.get(name)) for name in names)])
    return aligned(rows) if measured else ""


def _cell(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else in_words(Interval(**found))
