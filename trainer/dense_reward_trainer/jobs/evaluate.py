"""The `evaluate` job: measures checkpoints on held-out prompts; writes a table, the figures as JSON and every response.

Read from `run` downwards. All checkpoints answer the same prompts, with the same seed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import Report

from dense_reward_trainer.configs.dpr import EvaluateConfig
from dense_reward_trainer.rl.held_out_metrics import Estimate, HeldOutResult, SampledResponse, measure_held_out
from dense_reward_trainer.rl.policy import PolicyCheckpoint, load_policy
from dense_reward_trainer.rl.prompts import held_out_rows
from dense_reward_trainer.rl.records import TokenRewards
from dense_reward_trainer.rl.reward_service import ServiceAddress, connected
from dense_reward_trainer.runs.run_folder import check_run, open_run

# title of a column -> its value
COLUMNS: Mapping[str, Callable[[HeldOutResult], Estimate | float | None]] = {
    "greedy accuracy": lambda result: result.greedy_accuracy,
    "sampled accuracy": lambda result: result.sampled_accuracy,
    "NLL per token": lambda result: result.nll_per_token,
    "KL to SFT": lambda result: result.kl_to_sft,
    "length": lambda result: result.length_tokens,
    "cut off": lambda result: result.truncated,
}


def run(config: EvaluateConfig, report: Report) -> None:
    """Writes `evaluation.json` and `samples-NAME.jsonl` to `config.output_dir`, and reports a table.

    Raises ConfigError, DataError, CheckpointError or JobError; the message states the cure.
    """
    check_run("evaluate", config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    results: dict[str, HeldOutResult] = {}
    samples: dict[str, list[SampledResponse]] = {}
    for name, folder in config.checkpoints.items():
        report(f"measuring {name} ({folder})")
        checkpoint = load_policy(folder, precision=config.precision, device=chosen_device(config.device))
        temperature = config.temperatures.get(name, 1.0)
        results[name], samples[name] = measure_checkpoint(config, checkpoint, temperature, report)
    started = open_run("evaluate", config)
    for name, records in samples.items():
        write_samples(started.folder / f"samples-{name}.jsonl", records)
    figures = {name: asdict(result) for name, result in results.items()}
    write_whole(started.folder / "evaluation.json", json.dumps(figures, indent=2, allow_nan=False).encode() + b"\n")
    report(evaluation_table(results))
    report(f"figures and samples: {started.folder}")


def measure_checkpoint(
    config: EvaluateConfig, checkpoint: PolicyCheckpoint, temperature: float, report: Report
) -> tuple[HeldOutResult, list[SampledResponse]]:
    """Measures one checkpoint on the held-out prompts, rendered as in its training."""
    options = config.held_out_options
    limit_tokens = checkpoint.policy.limit_tokens
    rows = held_out_rows(config.held_out, checkpoint.encoder, limit_tokens, options.max_new_tokens, report)
    with sft_model_rewards(config, checkpoint, report) as rewards:
        return measure_held_out(checkpoint, rows, options, rewards, temperature)


@contextmanager
def sft_model_rewards(
    config: EvaluateConfig, checkpoint: PolicyCheckpoint, report: Report
) -> Iterator[TokenRewards | None]:
    """Log-probs of the service's SFT model; None if the configuration names no service."""
    if config.service_url is None:
        yield None
        return
    address, sha256 = ServiceAddress.of(config.service_url, config), checkpoint.manifest.tokenizer_sha256
    with connected(address, sha256, report, signal="sft_logprob", with_kl=False) as rewards:
        yield rewards


def write_samples(path: Path, samples: Sequence[SampledResponse]) -> None:
    lines = [json.dumps(asdict(sample), ensure_ascii=False) for sample in samples]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def evaluation_table(results: Mapping[str, HeldOutResult]) -> str:
    """One aligned line for each checkpoint: each mean with its standard error."""
    rows = [["checkpoint", *COLUMNS]]
    rows += [[name, *(_cell(column(result)) for column in COLUMNS.values())] for name, result in results.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _cell(value: Estimate | float | None) -> str:
    if value is None:
        return "-"
    return f"{value.value:.3f} ± {value.standard_error:.3f}" if isinstance(value, Estimate) else f"{value:.4f}"
