"""The tables of docs/methods.md from bench/results/methods.json."""

from bench.studies import evidence_page as evidence
from bench.studies.evidence import Record
from bench.studies.evidence_page import interval, tuning_block, unfinished
from bench.tables import table

METRICS = ("sampled_accuracy", "greedy_accuracy")
TASKS = ("mixed", "additions")
NAMES = {
    **evidence.NAMES,
    "dpr_early": "DPR, the early reference",
    "spin": "SPIN, three iterations",
    "irft_1": "IRFT, T = 1",
    "irft_5": "IRFT, T = 5",
    "irft_1_greedy": "IRFT, T = 1, greedy answers",
    "gsil": "GSIL, greedy answers",
    "gsil_sampled": "GSIL, sampled answers",
    "rft": "RFT, two rounds",
}
SIGNALS = ("sft_logprob", "entropy_corrected", "reward", "centred")
AGGREGATES = ("sum", "mean", "min")


def blocks(study: Record | None) -> dict[str, str]:
    """The page's blocks by name, as Markdown; None: the study was not run."""
    names = (*TASKS, "rewards", "tuning")
    if study is None:
        return dict.fromkeys(names, unfinished("methods"))
    found = {task: methods_block(study, task) for task in TASKS}
    return found | {"rewards": rewards_block(study), "tuning": tuning_block(study["tuning"], NAMES)}


def methods_block(study: Record, task: str) -> str:
    """What each method leaves, and DPR minus the method, paired over the seeds."""
    if task not in study["summary"]:
        return unfinished("methods")
    differences = study["primary"][task]["differences"]
    head = ["method", "sampled", "greedy", "tokens", "KL to SFT", "DPR minus it, sampled", "DPR minus it, greedy", "p"]
    rows = []
    for method, figures in study["summary"][task].items():
        compared = [differences[metric].get(method) for metric in METRICS]
        rows.append(
            [
                NAMES.get(method, method),
                *(interval(figures.get(metric)) for metric in METRICS),
                f"{figures['length_tokens']['value']:.1f}",
                f"{round(figures['kl_to_sft']['value'], 2) + 0.0:.2f}",
                *("-" if one is None else interval(one["interval"]) for one in compared),
                " / ".join("-" if one is None else f"{one['p_holm']:.1g}" for one in compared),
            ]
        )
    return f"{table(head, rows)}\n\n{len(study['cells'][task])} seeds; p is corrected by Holm's method."


def rewards_block(study: Record) -> str:
    """How well each reward finds a wrong digit in a right answer, and ranks right above wrong samples."""
    rows = [
        [
            task,
            NAMES.get(training, training),
            f"`{signal}`",
            *(interval(found.get(name)) for name in ("digit", *AGGREGATES)),
        ]
        for task, trainings in study["rewards"].items()
        for training, signals in trainings.items()
        for signal, found in signals.items()
        if signal.partition(":")[0] in SIGNALS
    ]
    head = ["task", "training", "signal", "a wrong digit", *(f"samples, {name}" for name in AGGREGATES)]
    return table(head, rows)
