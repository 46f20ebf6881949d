"""The `rft` job: rounds of a reward model from demonstrations, and of policy steps on it (RFT, arXiv 2405.17888).

Each round has three stages (reward_model/): the policy answers the prompts of its demonstrations; a scalar head learns
to tell demonstrations from these answers; the policy learns from the head. Each stage ends with a file or a checkpoint
that appears whole, and a run that was killed goes on after the last of them.
"""

import os
from dataclasses import dataclass

import torch
from dense_reward.engines.torch.device import chosen_device
from dense_reward.manifest import load_manifest
from dense_reward.records import Report

from dense_reward_trainer.configs.rft import RftConfig
from dense_reward_trainer.data.sources import DataError, load, split
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations, rows_sha256
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.reward_model.rounds import Setting, answer, learn_head, learn_policy, measure, write_metrics
from dense_reward_trainer.rl.policy import PolicyCheckpoint, load_policy
from dense_reward_trainer.rl.prompts import check_disjoint, check_room, held_out_rows
from dense_reward_trainer.runs.next_step import evaluate, finished, quoted
from dense_reward_trainer.runs.run_folder import check_run, open_run, pin


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Demonstrations to learn from, and rows to measure on."""

    train: tuple[TokenisedRow, ...]
    held_out: tuple[TokenisedRow, ...]


def run(config: RftConfig, report: Report) -> None:
    """Runs the rounds that are not done yet; leaves `checkpoints/token_head-N` and `checkpoints/policy-N` of each.

    Raises ConfigError, DataError, CheckpointError or JobError; the message states the cure.
    """
    check_run("rft", config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("rft runs in one process: start it without torchrun or accelerate launch")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    start = load_policy(config.policy, precision=config.precision, device=chosen_device(config.device))
    rows = rows_of(config, start, report)
    opened = open_run("rft", config)
    setting = Setting(config, start, rows.train, rows.held_out, opened)
    pin(opened, identity_of(config, start, rows))
    report(f"{len(rows.train)} demonstrations, {setting.share} a round; {len(rows.held_out)} held out")
    measure(setting, 0, report)
    for n in range(1, config.rounds + 1):
        pairs = answer(setting, n, report)
        learn_head(setting, n, pairs, report)
        if config.policy_steps is not None:
            learn_policy(setting, n, config.policy_steps, report)
            measure(setting, n, report)
        write_metrics(setting, n)
    report(last_line(setting))


def rows_of(config: RftConfig, start: PolicyCheckpoint, report: Report) -> Rows:
    """The rows as ids. Raises DataError if one is bad, if there are too few, or if a held-out prompt is trained on."""
    loaded = load(config.data)
    report(loaded.summary)
    parts = split(loaded.demonstrations, config.data.held_out_fraction, config.data.seed)
    encoder, limit_tokens = start.encoder, start.policy.limit_tokens
    encoded = encode_demonstrations(
        parts.train, encoder, every_turn=False, limit_tokens=limit_tokens, skip_bad=config.data.skip_bad
    )
    if encoded.dropped:
        report(f"left out {len(encoded.dropped)} demonstrations, the first is {encoded.dropped[0]}")
    cure = "or remove such demonstrations"
    check_room(encoded.rows, limit_tokens, config.max_new_tokens, "max_new_tokens", cure)
    wanted = max(2, config.rounds)
    if len(encoded.rows) < wanted:
        raise DataError(f"{config.data.source}: {len(encoded.rows)} demonstrations, but at least {wanted} are needed")
    if config.held_out is None:
        return Rows(encoded.rows, ())
    tokens = config.held_out_options.max_new_tokens
    held_out = held_out_rows(config.held_out, encoder, limit_tokens, tokens, report)
    check_disjoint([row.encoded.prompt_P for row in encoded.rows], held_out)
    return Rows(encoded.rows, tuple(held_out))


def identity_of(config: RftConfig, start: PolicyCheckpoint, rows: Rows) -> dict[str, str]:
    """The hashes of all inputs of a run."""
    identity = {
        "policy": start.manifest.weights_sha256,
        "demonstrations": rows_sha256(rows.train),
        "held-out rows": rows_sha256(rows.held_out),
    }
    if config.head_start is not None:
        identity["head start"] = load_manifest(config.head_start).weights_sha256
    return identity


def last_line(setting: Setting) -> str:
    """What is finished, and what to run next: the head can be served, and the policy compared with its start."""
    config, last = setting.config, setting.config.rounds
    head = setting.head_folder(last)
    serve = f"dense-reward serve --token-head {quoted(head)}"
    if config.policy_steps is None:
        return finished(head, serve)
    policy = setting.policy_folder(last)
    keys = {
        "service_url": None,
        "held_out_options.max_new_tokens": config.held_out_options.max_new_tokens,
        "device": config.device,
        "precision": config.precision,
        "output_dir": config.output_dir / "evaluation",
    }
    return finished(policy, f"{evaluate({'start': config.policy, 'rft': policy}, config.held_out, keys)}, or", serve)
