"""Writes the tables of docs/results.md from bench/results: `python -m bench.results_page`.

Measures nothing: the files are those of `bench/credit.py` and `bench/estimators.py`.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, median
from typing import TypedDict

from bench.tables import replace_block, table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "bench" / "results"

SIGNALS = ("sft_logprob", "reward", "centred")
# (file, key of its medians) -> what the row compares; a `{samples}` is replaced by the numbers of ranked samples.
CREDIT_ROWS = {
    ("arithmetic", "corrupted digit"): "additions: a wrong digit against the other tokens of its answer",
    ("arithmetic", "corrupted step"): "additions: a wrong line against the other tokens of its answer",
    ("arithmetic", "ranking"): "additions: {samples} samples, summed over the answer",
    ("gsm8k", "corrupted number"): "GSM8K: a wrong number against the other digit tokens",
    ("gsm8k", "corrupted word"): "GSM8K: a wrong word against the other digit tokens",
    ("gsm8k", "corrupted step"): "GSM8K: a wrong step against the other digit tokens",
}
POLICIES = {
    "sft": "SFT",
    "tempered": "SFT at a lower temperature, matched to the KL of DPR best",
    "continued": "SFT continued, matched to the FLOPs of DPR best",
    "dpr_paper": "DPR with the paper's settings",
    "end_paid": "DPR with the paper's settings, but with the early reference and `returns: total`",
    "dpr_half_way": "DPR best, but with the half-way reference",
    "dpr_sft_logprob": "DPR best, but `sft_logprob` as the reward",
    "dpr_best": "**DPR best**",
}


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
    """bench/results/credit_NAME.json: medians by reference, comparison and signal; runs by seed and reference."""

    medians: Mapping[str, Mapping[str, Mapping[str, float]]]
    seeds: Mapping[str, Mapping[str, CreditRun]]


class Outcome(TypedDict):
    """One set of options on the task with a known optimum; lists have one entry for each seed."""

    learning_rate: float
    gap_closed: list[float]
    tokens_to_half: list[float | None]


class OptionsConfig(TypedDict):
    estimators: Mapping[str, Mapping[str, object]]


class OptionsStudy(TypedDict):
    config: OptionsConfig
    outcomes: Mapping[str, Outcome]


class RegimesStudy(TypedDict):
    summary: Mapping[str, Mapping[str, Mapping[str, Estimate]]]


class EstimatorsFile(Provenance):
    """bench/results/estimators.json."""

    estimators: OptionsStudy
    regimes: RegimesStudy
    gap_closed_best: float
    gap_closed_paper: float
    sample_ratio_to_half_gap: float | None
    sample_ratio_to_half_gap_fastest_rates: float | None


def main() -> int:
    """Rewrites the blocks of the page; exit code 0."""
    for name, body in blocks().items():
        replace_block(PAGE, name, body)
    print(f"written: {PAGE}")
    return 0


def blocks() -> dict[str, str]:
    """The page's blocks by name, as Markdown."""
    credit: dict[str, CreditFile] = {
        task: json.loads((RESULTS / f"credit_{task}.json").read_text("utf-8")) for task in ("arithmetic", "gsm8k")
    }
    studies: EstimatorsFile = json.loads((RESULTS / "estimators.json").read_text("utf-8"))
    return {
        "credit": credit_block(credit),
        "policies": policies_block(studies),
        "options": options_block(studies),
    }


def credit_block(files: Mapping[str, CreditFile]) -> str:
    """AUROC of each signal, with the half-way and with the early reference; then where the figures come from."""
    head = ["AUROC", *(f"`{name}`" for name in SIGNALS), *(f"`{name}`, early" for name in SIGNALS[1:])]
    rows = [
        [label.format(samples=samples(files[task])), *credit_cells(files[task], comparison)]
        for (task, comparison), label in CREDIT_ROWS.items()
    ]
    sources = (source(f"credit_{task}.json", file) for task, file in files.items())
    return "\n".join([table(head, rows), "", *sources])


def credit_cells(file: CreditFile, comparison: str) -> list[str]:
    half_way, early = (file["medians"][reference][comparison] for reference in ("reference", "early"))
    return [f"{found[name]:.3f}" for found, names in ((half_way, SIGNALS), (early, SIGNALS[1:])) for name in names]


def samples(file: CreditFile) -> str:
    """How many right and wrong samples were ranked, over the training seeds."""
    runs = [runs["reference"] for runs in file["seeds"].values()]
    right, wrong = [run["right"] for run in runs], [run["wrong"] for run in runs]
    return f"{min(right)} to {max(right)} right against {min(wrong)} to {max(wrong)} wrong"


def policies_block(file: EstimatorsFile) -> str:
    """What each policy samples, how far it is from SFT, and what DPR gains."""
    (columns,) = file["regimes"]["summary"].values()
    head = ["policy", "sampled accuracy", "greedy", "length, tokens", "KL to SFT, nats"]
    rows = [
        [
            label,
            with_interval(columns[name]["sampled_accuracy"]),
            f"{columns[name]['greedy_accuracy']['value']:.3f}",
            f"{columns[name]['length_tokens']['value']:.1f}",
            f"{abs(columns[name]['kl_to_sft']['value']):.2f}",
        ]
        for name, label in POLICIES.items()
    ]
    gains = (
        f"Gain in sampled accuracy over SFT: DPR best {with_interval(columns['dpr_best']['sampled_accuracy_gain'])}, "
        f"lower temperature {with_interval(columns['tempered']['sampled_accuracy_gain'])}, "
        f"continued SFT {with_interval(columns['continued']['sampled_accuracy_gain'])}."
    )
    return "\n".join([table(head, rows), "", gains, "", source("estimators.json", file)])


def with_interval(found: Estimate) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def options_block(file: EstimatorsFile) -> str:
    """Each set of options, the largest mean of the gap closed first; then `best` compared with `paper`."""
    study = file["estimators"]
    head = ["options", "what is set", "learning rate", "gap closed, mean", "worst seed", "tokens to half, median"]
    order = sorted(study["outcomes"].items(), key=lambda item: -mean(item[1]["gap_closed"]))
    rows = (
        [
            f"`{name}`",
            settings(study["config"]["estimators"][name]),
            f"{found['learning_rate']:g}",
            f"{mean(found['gap_closed']):.3f}",
            f"{min(found['gap_closed']):.3f}",
            tokens(found["tokens_to_half"]),
        ]
        for name, found in order
    )
    return "\n".join([table(head, rows), "", *comparison_with_paper(file), "", source("estimators.json", file)])


def settings(options: Mapping[str, object]) -> str:
    return ", ".join(f"`{key}: {str(value).lower()}`" for key, value in options.items())


def tokens(counts: list[float | None]) -> str:
    """The median over seeds; "never" if a seed did not close half of the gap."""
    known = [count for count in counts if count is not None]
    return f"{median(known):,.0f}" if len(known) == len(counts) else "never"


def comparison_with_paper(file: EstimatorsFile) -> Iterator[str]:
    """Compares `best` with `paper`, one sentence per known ratio."""
    best, paper = file["gap_closed_best"], file["gap_closed_paper"]
    yield f"`best` closes {best:.2f} of the gap and `paper` closes {paper:.2f} (means over the seeds)."
    for key, rates in (
        ("sample_ratio_to_half_gap", "at the learning rates of the table (median over the seeds)"),
        ("sample_ratio_to_half_gap_fastest_rates", "if each takes its fastest learning rate (tuning seed)"),
    ):
        ratio = file.get(key)
        if isinstance(ratio, float):
            yield f"To close half of the gap, `paper` needs {ratio:.1f} times as many scored tokens as `best` {rates}."


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
