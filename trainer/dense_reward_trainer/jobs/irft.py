"""The `irft` job: self-play on demonstrations (IRFT, SPIN, GSIL) -> the improved model, and a reference per round.

In each round the model at its start answers prompts of the demonstrations, and TRL's DPOTrainer makes the demonstration
likelier than the answer, relative to that model. Read `selfplay/rounds.py` next. A killed run resumes if it is started
again, and generates nothing again that it has written.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from dense_reward.records import Report
from transformers.utils.logging import disable_progress_bar

from dense_reward_trainer.configs.irft import IrftConfig
from dense_reward_trainer.data.held_out_file import write_held_out
from dense_reward_trainer.data.sources import data_sha256
from dense_reward_trainer.data.tokenised import TokenisedRow, rows_sha256
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.runs.checkpoint import is_complete, recover
from dense_reward_trainer.runs.next_step import evaluate, finished, quoted
from dense_reward_trainer.runs.run_folder import Run, check_run, open_run, pin, plot_metrics
from dense_reward_trainer.selfplay.checkpoint_writer import RoundWriter, checkpoint_folders
from dense_reward_trainer.selfplay.generation import check_engine
from dense_reward_trainer.selfplay.plan import round_plans
from dense_reward_trainer.selfplay.rounds import SelfPlay
from dense_reward_trainer.selfplay.start import Start, read_start, training_rows
from dense_reward_trainer.selfplay.trainer import check_processes, training_arguments


def run(config: IrftConfig, report: Report) -> None:
    """Plays all rounds. Writes `checkpoints/sft`, `checkpoints/round_N` and `pairs/` to `config.output_dir`.

    Resumes a killed run, keeps a finished one. Raises ConfigError, DataError, CheckpointError or JobError; the message
    states the cure.
    """
    check_run("irft", config)
    disable_progress_bar()
    folders = checkpoint_folders(config)
    for folder in folders:
        recover(folder)
    if is_complete(folders[-1]):
        shutil.rmtree(config.output_dir / "resume", ignore_errors=True)
        report(f"{config.output_dir} holds a finished run, so there is nothing to do")
        report(last_line(config, folders[-1]))
        return
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    self_play = prepare(config, report)
    for plan in self_play.plans:
        if not is_complete(self_play.writer.folder_after(plan.number)):
            self_play.play(plan)
    plot_metrics(self_play.metrics, ("loss",), config.output_dir / "loss.png", ylabel="loss of a pair (nats)")
    shutil.rmtree(config.output_dir / "resume", ignore_errors=True)
    report(last_line(config, folders[-1]))


def last_line(config: IrftConfig, result: Path) -> str:
    """What is finished, and what to run next: compare it with its start, or serve a pair for each round."""
    run = config.output_dir
    held_out = run / "held_out.jsonl" if config.data.held_out_fraction > 0 else None
    keys = {
        "service_url": None,
        "held_out_options.max_new_tokens": config.generation.max_new_tokens,
        "device": config.device,
        "precision": config.precision,
        "output_dir": run / "evaluation",
    }
    command = evaluate({"start": config.policy, "irft": result}, held_out, keys)
    return finished(result, f"{command}, or dense-reward serve --run {quoted(run)}")


def prepare(config: IrftConfig, report: Report) -> SelfPlay:
    """Reads and verifies everything before anything is generated, and opens the run folder."""
    check_policy_is_elsewhere(config)
    start = read_start(config)
    check_engine(config, start)
    rows, held_out = training_rows(config, start, report)
    plans = round_plans(config, len(rows))
    check_processes(training_arguments(config, plans[0]))
    opened = start_run(config, start, rows)
    write_held_out(config.output_dir / "held_out.jsonl", [row.demonstration for row in held_out])
    writer = RoundWriter(config, opened.run_id, start, rows, plans)
    if not is_complete(writer.folder_after(0)):
        writer.write_start()
    report(
        f"{config.rounds} rounds on {len(rows)} demonstrations ({len(held_out)} held out), "
        f"{plans[-1].last_step} steps in all, from {config.policy}"
    )
    return SelfPlay(config, start, rows, plans, writer, report)


def start_run(config: IrftConfig, start: Start, rows: Sequence[TokenisedRow]) -> Run:
    """Opens the run folder. Raises ConfigError, naming the input, if a resumed run has other inputs."""
    opened = open_run("irft", config)
    identity = {
        "policy": start.manifest.weights_sha256,
        "tokenizer": start.manifest.tokenizer_sha256,
        "chat template": start.manifest.template_sha256,
        "data": data_sha256(row.demonstration for row in rows),
        "encoded rows": rows_sha256(rows),
    }
    pin(opened, identity)
    return opened


def check_policy_is_elsewhere(config: IrftConfig) -> None:
    """Raises ConfigError if the run would write over the checkpoint that it starts from."""
    if config.policy.resolve() in {folder.resolve() for folder in checkpoint_folders(config)}:
        raise ConfigError(f"the run would write over its policy, {config.policy}: use another output_dir")
