"""The `preview` job: would training on the reward help? Minutes with labelled answers, before hours of training.

It ranks right above wrong answers by every signal, aggregate and reference, measures the policy that is tilted by the
reward beside what the SFT model gives for free, and gives a verdict with its reason (preview/verdict.py has the rules).
No service is needed. Read from `run` downwards.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.errors import SettingsError
from dense_reward.manifest import load_manifest
from dense_reward.records import Report
from dense_reward.serving.pair_sources import pairs_of_run

from dense_reward_trainer.configs.preview import PreviewConfig
from dense_reward_trainer.data.final_answers import meaning_of_right
from dense_reward_trainer.data.sources import data_sha256
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.preview.evidence import Evidence, Models, check_references, evidence
from dense_reward_trainer.preview.labelled import Labelled, read_labelled
from dense_reward_trainer.preview.plot import plot_preview
from dense_reward_trainer.preview.table import gain_lines, ranking_lines, verdict_lines
from dense_reward_trainer.preview.verdict import Verdict, verdict
from dense_reward_trainer.rl.policy import PolicyCheckpoint, load_policy
from dense_reward_trainer.runs.kept_parts import KeptParts, inputs_of_config
from dense_reward_trainer.runs.next_step import again, finished, more_in, quoted, report_page
from dense_reward_trainer.runs.run_folder import check_run, open_run


def run(config: PreviewConfig, report: Report) -> Verdict:
    """Reports tables and the verdict; writes preview.json, preview.png, preview.svg and the sampled answers.

    A stopped job keeps the answers of the policies that it has finished with.
    Raises ConfigError, DataError, CheckpointError or JobError; the message states the cure.
    """
    check_run("preview", config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    labelled = read_labelled(config.labelled, config.checker)
    report(labelled.summary)
    sft, references = folders_of(config)
    check_references(sft, references, report)
    report(f"sft: {sft}; references: {', '.join(references) or 'none'}")
    device = chosen_device(config.device)
    checkpoint = load_policy(sft, precision=config.precision, device=device)
    parts = KeptParts(config.output_dir / "parts", report, _inputs(config, checkpoint, references, labelled))
    found = evidence(Models(sft, checkpoint, references, config, device), labelled, parts, report)
    result = verdict(found.ranking, found.gains, found.counts, list(references))
    judged = f"right and wrong are those that {config.labelled} marks"
    right = meaning_of_right(config.checker) if labelled.right is None else judged
    report(
        "\n".join(
            [*ranking_lines(found.ranking, found.counts), *gain_lines(found.gains), right, *verdict_lines(result)]
        )
    )
    folder = open_run("preview", config).folder
    for name, samples in found.samples.items():
        lines = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
        write_whole(folder / f"samples-{name.replace(' ', '-')}.jsonl", lines.encode())
    write_whole(folder / "preview.json", record(result, found, sft, references))
    plot_preview(found.ranking, found.gains, result, folder / "preview")
    report(finished(folder / "preview.json", next_step(config, result, sft, references, labelled)))
    return result


def _inputs(
    config: PreviewConfig, sft: PolicyCheckpoint, references: Mapping[str, Path], labelled: Labelled
) -> dict[str, str]:
    """What the sampled answers depend on, by name."""
    folders = references.items()
    return {
        **inputs_of_config(config),
        "the labelled data": data_sha256(labelled.demonstrations),
        "the weights of sft": sft.manifest.weights_sha256,
        **{f"the weights of {name}": load_manifest(folder).weights_sha256 for name, folder in folders},
    }


def next_step(
    config: PreviewConfig, result: Verdict, sft: Path, references: Mapping[str, Path], labelled: Labelled
) -> str:
    """Serve the reference that the verdict names; else what the verdict says, as a command."""
    if result.verdict == "gain" and result.reference is not None:
        return f"dense-reward serve --sft {quoted(sft)} --reference {quoted(references[result.reference])}"
    if result.verdict == "unknown" and labelled.right is not None:
        details = report_page(config.output_dir)
        return f"add judged answers to {quoted(config.labelled)}, or look at the details: {details}"
    if result.verdict == "unknown":
        more = {
            "prompts": 2 * config.prompts,
            "samples_per_prompt": 2 * config.samples_per_prompt,
            "output_dir": more_in(config.output_dir, "more"),
        }
        return again("preview", config, more)
    figures = f"all figures: {report_page(config.output_dir)}"
    if result.verdict == "control":
        return f"no training: sample as the verdict's control does, which is free; {figures}"
    return f"do not train on these references; {figures}"


def folders_of(config: PreviewConfig) -> tuple[Path, dict[str, Path]]:
    """The SFT checkpoint, and the references by name, the earliest first. Raises ConfigError or CheckpointError."""
    if config.sft is not None:
        return config.sft, dict(config.references)
    if config.run is None:
        raise ConfigError("name the models: run, or sft and references")
    try:
        pairs = pairs_of_run(config.run)
    except SettingsError as error:
        words = str(error).replace("--sft and --reference", "sft and references").replace("--run", "run")
        raise ConfigError(words) from None
    return pairs[0].sft, {pair.name: pair.reference for pair in pairs}


def record(result: Verdict, found: Evidence, sft: Path, references: dict[str, Path]) -> bytes:
    """The content of preview.json."""
    values = {
        "verdict": result.verdict,
        "reference": result.reference,
        "signal": result.signal,
        "aggregate": result.aggregate,
        "reason": result.reason,
        "references": {name: asdict(one) for name, one in result.references.items()},
        "counts": asdict(found.counts),
        "ranking": [asdict(one) for one in found.ranking],
        "gains": None if found.gains is None else asdict(found.gains),
        "models": {
            name: {"folder": str(folder), "weights_sha256": load_manifest(folder).weights_sha256}
            for name, folder in {"sft": sft, **references}.items()
        },
    }
    return json.dumps(values, indent=2, allow_nan=False).encode() + b"\n"
