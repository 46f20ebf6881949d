"""Writes the tables of docs/results.md and docs/methods.md from bench/results: `python -m bench.results_page`.

Measures nothing: the files are those of `bench/studies`, `bench/credit.py` and `bench/estimators.py`.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, NotRequired, TypedDict

from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.paired import in_words
from dense_reward_trainer.studies.options.table import gap_interval

from bench.credit import Medians
from bench.studies import evidence_page, figures_page, methods_page
from bench.studies.evidence import Record
from bench.tables import replace_block, table

ROOT = Path(__file__).resolve().parents[1]
PAGE, METHODS_PAGE = ROOT / "docs" / "results.md", ROOT / "docs" / "methods.md"
RESULTS = ROOT / "bench" / "results"

# column of the credit job -> its name on the page. The pair `reference` is the half-way reference.
COLUMNS = {
    "sft_logprob": "`sft_logprob`",
    "entropy_corrected": "`entropy_corrected`",
    "z_score": "`z_score`",
    "margin": "`margin`",
    "reward:reference": "`reward`, half-way",
    "centred:reference": "`centred`, half-way",
    "reward:early": "`reward`, early",
    "centred:early": "`centred`, early",
}
AGGREGATES = ("sum", "mean", "min", "window_min")
# (file, kind of error) -> what the row compares
ERRORS = {
    ("arithmetic", "digit"): "additions: a wrong digit against the other tokens of its answer",
    ("arithmetic", "step"): "additions: a wrong line against the other tokens of its answer",
    ("gsm8k", "number"): "GSM8K: a wrong number against the other digit tokens",
    ("gsm8k", "word"): "GSM8K: a wrong word against the other digit tokens",
    ("gsm8k", "step"): "GSM8K: a wrong step against the other digit tokens",
}
# (file, group of answers) -> what the row ranks; `{samples}` is replaced by the numbers of ranked samples.
RANKED = {
    ("arithmetic", "samples"): "additions: {samples} samples",
    ("gsm8k", "number"): "GSM8K: solutions against the same with a wrong number",
    ("gsm8k", "word"): "GSM8K: solutions against the same with a wrong word",
    ("gsm8k", "step"): "GSM8K: solutions against the same with a wrong step",
}
RATIOS: tuple[
    Literal["sample_ratio_to_half_gap"],
    Literal["sample_ratio_to_half_gap_ci_low"],
    Literal["sample_ratio_to_half_gap_ci_high"],
] = ("sample_ratio_to_half_gap", "sample_ratio_to_half_gap_ci_low", "sample_ratio_to_half_gap_ci_high")


class Estimate(TypedDict):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class CreditRun(TypedDict):
    """One credit job: how many right and wrong samples it ranked."""

    right: int
    wrong: int


class Provenance(TypedDict):
    commit: str
    machine: Mapping[str, str | int]
    versions: Mapping[str, str]


class CreditFile(Provenance):
    """bench/results/credit_NAME.json: medians over the seeds, and the credit job of each seed."""

    medians: Medians
    seeds: Mapping[str, CreditRun]


class Outcome(TypedDict):
    """One set of options on the task with a known optimum; lists have one entry for each seed."""

    learning_rate: float
    rates_tried: list[float]
    gap_closed: list[float]
    tokens_to_half: list[float | None]


class Difference(TypedDict):
    """Gap closed minus that of the control, paired over seeds."""

    interval: Estimate
    p_holm: float


class OptionsConfig(TypedDict):
    control: str
    compared: list[str]
    kl_coefficient: float
    estimators: Mapping[str, Mapping[str, object]]


class OptionsStudy(TypedDict):
    config: OptionsConfig
    outcomes: Mapping[str, Outcome]
    differences: Mapping[str, Difference]


class EstimatorsFile(Provenance):
    """bench/results/estimators.json."""

    estimators: OptionsStudy
    sample_ratio_to_half_gap: float | None
    sample_ratio_to_half_gap_ci_low: float | None
    sample_ratio_to_half_gap_ci_high: float | None
    sample_ratio_to_half_gap_fastest_rates: float | None


class StudyFile(Provenance):
    """The file of a study of bench/studies, whose pages read `study`."""

    study: Mapping[str, Any]
    study_commits: Mapping[str, int]
    kept: NotRequired[Mapping[str, Provenance]]


def main() -> int:
    """Rewrites the blocks of the pages; exit code 0."""
    for page, blocks in ((PAGE, results_blocks()), (METHODS_PAGE, methods_blocks())):
        for name, body in blocks.items():
            replace_block(page, name, body)
        print(f"written: {page}")
    return 0


def methods_blocks() -> dict[str, str]:
    """The blocks of docs/methods.md by name, as Markdown."""
    return study_blocks("methods", methods_page.blocks)


def study_blocks(name: str, blocks: Callable[[Record | None], dict[str, str]]) -> dict[str, str]:
    """The blocks of a study, each with its source; without one if the study was not run."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return blocks(None)
    found: StudyFile = json.loads(path.read_text("utf-8"))
    made = study_source(path.name, found)
    return {block: f"{body}\n\n{made}" for block, body in blocks(found["study"]).items()}


def results_blocks() -> dict[str, str]:
    """The blocks of docs/results.md by name, as Markdown."""
    credit: dict[str, CreditFile] = {
        task: json.loads(path.read_text("utf-8"))
        for task in ("arithmetic", "gsm8k")
        if (path := RESULTS / f"credit_{task}.json").is_file()
    }
    options: EstimatorsFile = json.loads((RESULTS / "estimators.json").read_text("utf-8"))
    return {
        "credit": credit_block(credit),
        **study_blocks("evidence", evidence_page.blocks),
        **study_blocks("figures", figures_page.blocks),
        "options": options_block(options),
    }


def credit_block(files: Mapping[str, CreditFile]) -> str:
    """AUROC of each column: for errors in answers, then for whole answers by aggregate; then the sources."""
    measured = {column for file in files.values() for found in located(file).values() for column in found}
    columns = [column for column in COLUMNS if column in measured]
    names = [COLUMNS[column] for column in columns]
    errors = (
        [label, *cells(located(files[task])[kind], columns)] for (task, kind), label in ERRORS.items() if task in files
    )
    ranked = ((*key, label, name) for key, label in RANKED.items() for name in AGGREGATES if key[0] in files)
    answers = (
        [
            label.format(samples=samples(files[task])),
            f"`{name}`",
            *cells(by_aggregate(files[task], group, name), columns),
        ]
        for task, group, label, name in ranked
    )
    tables = [table(["AUROC of errors", *names], errors), table(["AUROC of answers", "aggregate", *names], answers)]
    sources = (source(f"credit_{task}.json", file) for task, file in files.items())
    return "\n".join([tables[0], "", tables[1], "", *sources])


def located(file: CreditFile) -> Mapping[str, Mapping[str, float]]:
    return file["medians"]["localisation"]


def by_aggregate(file: CreditFile, group: str, name: str) -> dict[str, float]:
    """The AUROC of each column with one aggregate."""
    return {column: found[name] for column, found in file["medians"]["ranking"][group].items()}


def cells(found: Mapping[str, float], columns: Iterable[str]) -> list[str]:
    return [f"{found[column]:.3f}" for column in columns]


def samples(file: CreditFile) -> str:
    """How many right and wrong samples were ranked, over the training seeds."""
    right, wrong = ([run[kind] for run in file["seeds"].values()] for kind in ("right", "wrong"))
    return f"{min(right)} to {max(right)} right against {min(wrong)} to {max(wrong)} wrong"


def with_interval(found: Estimate) -> str:
    return in_words(Interval(**found))


def options_block(file: EstimatorsFile) -> str:
    """Each set of options, the largest mean of the gap closed first; then the tuned one compared with the plain one."""
    head = [
        "options",
        "what is set",
        "moves towards",
        "learning rate (tried)",
        "seeds",
        "gap closed",
        "minus `plain`, paired",
        "p, Holm",
        "tokens to half",
    ]
    study = file["estimators"]
    order = sorted(study["outcomes"], key=lambda name: -mean(study["outcomes"][name]["gap_closed"]))
    rows = (option_row(study, name) for name in order)
    sentences = [what_differs(study), *cost_of_the_plain_option(file)]
    return "\n".join([table(head, rows), "", *sentences, "", source("estimators.json", file)])


def option_row(study: OptionsStudy, name: str) -> list[str]:
    """One set of options; those that get all seeds, and the control, are bold."""
    config, found = study["config"], study["outcomes"][name]
    options = config["estimators"][name]
    bold = "**" if name in (config["control"], *config["compared"]) else ""
    difference = study["differences"].get(name)
    return [
        f"{bold}`{name}`{bold}",
        settings(options),
        fixed_point(options, config["kl_coefficient"]),
        f"{found['learning_rate']:g} ({len(found['rates_tried'])}{', at the edge' if on_edge(found) else ''})",
        str(len(found["gap_closed"])),
        in_words(gap_interval(found["gap_closed"])),
        "-" if difference is None else with_interval(difference["interval"]),
        "-" if difference is None else p_value(difference["p_holm"]),
        tokens(found["tokens_to_half"]),
    ]


def fixed_point(options: Mapping[str, object], coefficient: float) -> str:
    """Where training stands still if the policy can be any distribution; b is the coefficient of the KL.

    With the reward-to-go or the total, the optimum of the reward that is paid, a tilted distribution of whole
    responses. With immediate credit, each token is tilted by its own reward alone. With the KL as a loss, b stands
    against the later rewards, Q, of each state: later KL is ignored.
    """
    power = f"{1 / coefficient:g}"
    where = " at each token" if options.get("returns") == "immediate" else ""
    cases = {
        f"π_sft exp({power} Q), without later KL": options.get("kl_penalty") == "loss_k2" and not where,
        "π_sft b / (b - Q + V), without later KL": options.get("kl_penalty") == "loss_k3",
        "the optimum of no objective": options.get("gamma", 1.0) != 1.0 or options.get("returns") == "min",
        f"π_sft^{1 + 1 / coefficient:g}{where}": options.get("signal") == "sft_logprob",
        f"π_sft exp({power} Σ (r - kl)){where}": options.get("signal") == "centred",
        f"π_sft exp({power} Σ clipped r){where}": "reward_clip" in options,
        "near the optimum (biased)": options.get("normalise") == "tokens",
        f"π_sft (π_sft / π_ref)^{power}{where}": bool(where),
    }
    return next((case for case, applies in cases.items() if applies), "the optimum")


def on_edge(found: Outcome) -> bool:
    """Whether a rate beyond those that were tried might be better."""
    return found["learning_rate"] in (min(found["rates_tried"]), max(found["rates_tried"]))


def settings(options: Mapping[str, object]) -> str:
    return ", ".join(f"`{key}: {str(value).lower()}`" for key, value in options.items())


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def tokens(counts: list[float | None]) -> str:
    """The median over seeds; "never" if a seed did not close half of the gap."""
    known = [count for count in counts if count is not None]
    return f"{median(known):,.0f}" if len(known) == len(counts) else "never"


def what_differs(study: OptionsStudy) -> str:
    """The options that differ from the control after the correction, in a sentence."""
    differ = {name: one["interval"]["value"] for name, one in study["differences"].items() if one["p_holm"] < 0.05}
    above = [f"`{name}`" for name, value in differ.items() if value > 0]
    below = [f"`{name}`" for name, value in differ.items() if value < 0]
    control = study["config"]["control"]
    return (
        f"After the correction, at 5 %: {', '.join(above) or 'none'} above `{control}`; "
        f"{', '.join(below) or 'none'} below it."
    )


def cost_of_the_plain_option(file: EstimatorsFile) -> Iterator[str]:
    """How many times as many scored tokens `plain` needs, one sentence per known ratio."""
    ratio, low, high = (file[key] for key in RATIOS)
    if ratio is not None and low is not None and high is not None:
        found = in_words(Interval(ratio, low, high), digits=1)
        yield (
            f"To close half of the gap, `plain` needs {found} times as many scored tokens as `tuned` at the learning "
            "rates of the table (geometric mean over the seeds)."
        )
    fastest = file["sample_ratio_to_half_gap_fastest_rates"]
    if fastest is not None:
        yield (
            f"If each takes the learning rate that is fastest on the tuning task, it needs {fastest:.1f} times as many "
            "there (one seed, so no interval)."
        )


def study_source(name: str, file: StudyFile) -> str:
    """`source` with the commit at which the jobs of the study ran, not that of its analysis; names several as such.

    Regimes that were kept from an earlier run have lines of their own.
    """
    ran = file["study_commits"]
    most = max(ran, key=lambda commit: ran[commit])
    made: Provenance = {"commit": most, "machine": file["machine"], "versions": file["versions"]}
    others = sum(ran.values()) - ran[most]
    lines = [source(name, made) + (f" {others} of {sum(ran.values())} jobs ran at other commits." * bool(others))]
    lines += [f"{source(name, earlier)} Of it: {regime}." for regime, earlier in file.get("kept", {}).items()]
    return "\n".join(lines)


def source(name: str, file: Provenance) -> str:
    """Where the figures come from: file, commit, machine and versions."""
    machine, versions = file["machine"], file["versions"]
    commit, _, state = file["commit"].partition("-")
    return (
        f"- [{name}](../bench/results/{name}): commit {commit[:12]}{f' ({state})' if state else ''}, "
        f"{machine['processor']}, {machine['cores']} cores, torch {versions['torch']}, "
        f"transformers {versions['transformers']}."
    )


if __name__ == "__main__":
    sys.exit(main())
