"""The tables of docs/results.md from bench/results/evidence.json."""

from collections.abc import Mapping, Sequence
from statistics import mean

from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.paired import in_words

from bench.studies.evidence import Record
from bench.tables import table

NAMES = {
    "sft": "SFT",
    "dpr": "**DPR, the base as reference** (fixed point π_sft² / π_base, token by token)",
    "dpr_early": "DPR, the early reference (π_sft² / π_early)",
    "dpr_half_way": "DPR, the half-way reference (π_sft² / π_half)",
    "tilted": "tilted: π_sft (π_sft/π_base)^a, no training",
    "best_of_8_reward_sum": "best of 8 by `reward`, sum",
    "best_of_8_reward_min": "best of 8 by `reward`, min",
    "best_of_8_centred_min": "best of 8 by `centred`, min",
    "dpr_sft_logprob": "DPR paid `sft_logprob` (temperature ½ is its fixed point)",
    "continued": "SFT continued for the FLOPs of DPR",
    "temperature": "SFT, temperature",
    "top_p": "SFT, top-p",
    "min_p": "SFT, min-p",
    "extrapolated": "weights θ_sft + a (θ_sft − θ_base)",
    "power_4": "power sampling, π_sft⁴ from 8 samples",
    "majority_of_8": "majority of 8",
    "best_of_8_sft_logprob_sum": "best of 8 by `sft_logprob`, sum",
    "best_of_8_sft_logprob_min": "best of 8 by `sft_logprob`, min",
    "best_of_8_entropy_corrected_sum": "best of 8 by `sft_logprob + entropy`, sum",
}
BLOCKS = ("mixed", "additions", "nuisance", "boundary", "preview", "tuning")
VERDICTS = {
    "gain": "expect a gain",
    "control": "no more than a control",
    "no": "do not train",
    "unknown": "cannot tell",
}


def blocks(study: Record | None) -> dict[str, str]:
    """The page's blocks by name, as Markdown; None: the study was not run."""
    if study is None:
        return dict.fromkeys(BLOCKS, unfinished("evidence"))
    return {
        "mixed": policies_block(study, "mixed"),
        "additions": policies_block(study, "additions"),
        "nuisance": policies_block(study, "nuisance"),
        "boundary": boundary_block(study),
        "preview": preview_block(study["preview"]),
        "tuning": tuning_block(study["tuning"]),
    }


def policies_block(study: Record, regime: str) -> str:
    """Accuracies of every policy of a regime, and the primary policy minus each, paired over the seeds."""
    if regime not in study["summary"]:
        return unfinished("evidence")
    summary, primary = study["summary"][regime], study["primary"][regime]
    head = ["policy", "sampled", "greedy", "KL to SFT", "DPR minus it, sampled", "DPR minus it, greedy", "p, Holm"]
    rows = []
    for name, figures in summary.items():
        compared = [primary["differences"][metric].get(name) for metric in ("sampled_accuracy", "greedy_accuracy")]
        kl = figures.get("kl_to_sft")
        rows.append(
            [
                NAMES.get(name, name),
                interval(figures["sampled_accuracy"]),
                interval(figures.get("greedy_accuracy")),
                "-" if kl is None else f"{round(kl['value'], 2) + 0.0:.2f}",
                *("-" if one is None else interval(one["interval"]) for one in compared),
                " / ".join("-" if one is None else f"{one['p_holm']:.1g}" for one in compared),
            ]
        )
    return table(head, rows)


def boundary_block(study: Record) -> str:
    """The gain of DPR by how far the demonstrations are above the model that SFT starts from."""
    if len(study["boundary"]) < 2:
        return unfinished("evidence")
    places = sorted(study["boundary"].items(), key=lambda pair: float(pair[1]["shift"]["value"]))
    rows = [
        [
            interval(one["shift"]),
            interval(study["summary"][name]["sft"]["sampled_accuracy"]),
            interval(study["summary"][name]["dpr"]["sampled_accuracy"]),
            interval(one["gain"]),
            str(len(study["cells"][name])),
        ]
        for name, one in places
    ]
    return table(["demonstrations − start", "SFT, sampled", "DPR, sampled", "gain of DPR over SFT", "seeds"], rows)


def preview_block(previews: Sequence[Record]) -> str:
    """For each task and reference, the verdicts, what training then did on the mean, and how many were right."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for one in previews:
        groups.setdefault((one["regime"], one["reference"]), []).append(one)
    rows = [
        [
            regime,
            reference,
            ", ".join(f"{words}: {count}" for kind, words in VERDICTS.items() if (count := verdicts(checks, kind))),
            f"{mean(one['over_sft'] for one in checks):+.3f}",
            f"{mean(one['over_control'] for one in checks):+.3f}",
            f"{sum(one['right'] for one in checks)} of {len(checks)}",
        ]
        for (regime, reference), checks in groups.items()
    ]
    head = ["task", "reference", "verdicts", "DPR − SFT", "DPR − best free control", "right"]
    right, unknown = sum(one["right"] for one in previews), verdicts(previews, "unknown")
    return f"{table(head, rows)}\n\n{right} of {len(previews)} verdicts were right; {unknown} could not tell."


def verdicts(checks: Sequence[Record], kind: str) -> int:
    """How many verdicts are of a kind."""
    return sum(one["verdict"]["verdict"] == kind for one in checks)


def tuning_block(tuning: Record, names: Mapping[str, str] = NAMES) -> str:
    """What was tried for each policy on the tuning seed."""
    rows = [
        [
            regime,
            names.get(name, name),
            f"`{one['key']}`",
            ", ".join(f"{value} ({mean:.2f})" for value, mean in zip(one["values"], one["means"], strict=True)),
            f"{one['chosen']}{' (edge)' if one['on_edge'] else ''}",
        ]
        for regime, choices in tuning.items()
        for name, one in choices.items()
    ]
    return table(["task", "policy", "option", "values tried (sampled accuracy)", "chosen"], rows)


def unfinished(study: str) -> str:
    """What stands in the place of figures that were not measured."""
    return f"Not measured yet: `make {study}` does."


def interval(found: Record | None) -> str:
    """A mean with its 95 % interval; "no spread" if all seeds gave the same, so that there is no interval."""
    return "-" if found is None else in_words(Interval(**found))
