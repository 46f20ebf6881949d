"""The `dpr` job: Dense-Path REINFORCE (arXiv 2510.02493), which improves a policy on token rewards from a service.

Every step (rl/learner.py) samples G responses to each of its prompts and requests the reward of every token. It
subtracts b (log pi - log pi_sft) and takes a REINFORCE step on the reward-to-go minus a baseline (rl/advantages.py).
It loads no critic, no reference model and no SFT model. DprConfig has an option for each choice that was not available
to us from the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import IdArray, Report

from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.data.tokenised import TokenisedRow
from dense_reward_trainer.jobs.dpr_policy import last_line, write_policy
from dense_reward_trainer.rl.held_out_metrics import measure_held_out
from dense_reward_trainer.rl.learner import Learner
from dense_reward_trainer.rl.plot import plot_run
from dense_reward_trainer.rl.policy import PolicyCheckpoint, load_policy
from dense_reward_trainer.rl.prompts import check_room_at_service, prompts_and_held_out, prompts_sha256
from dense_reward_trainer.rl.records import TokenRewards
from dense_reward_trainer.rl.reward_service import ServiceAddress, connected
from dense_reward_trainer.runs.checkpoint import is_complete, recover
from dense_reward_trainer.runs.progress import Progress
from dense_reward_trainer.runs.run_folder import METRICS_NAME, MetricsLog, Run, check_run, open_run, pin, redacted
from dense_reward_trainer.runs.trackers import check_trackers, open_trackers
from dense_reward_trainer.runs.training_state import TrainingStates


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """Everything that a run uses. Only the learner changes from step to step."""

    config: DprConfig
    checkpoint: PolicyCheckpoint
    learner: Learner
    prompts: Sequence[IdArray]
    held_out: Sequence[TokenisedRow]
    run: Run
    metrics: MetricsLog

    @property
    def states(self) -> TrainingStates:
        return TrainingStates(self.run.folder / "resume")


def run(config: DprConfig, report: Report) -> None:
    """Trains, and writes `checkpoints/policy` to `config.output_dir`. Resumes a killed run, keeps a finished one.

    Raises ConfigError, DataError, CheckpointError or JobError; the message states the cure.
    """
    check_trackers(config.report_to)
    if config.engine == "trl":
        from dense_reward_trainer.jobs import dpr_trl  # noqa: PLC0415 - trl takes seconds to import

        dpr_trl.run(config, report)
        return
    check_run("dpr", config)
    policy = config.output_dir / "checkpoints" / "policy"
    recover(policy)
    if is_complete(policy):
        TrainingStates(config.output_dir / "resume").remove()
        report(f"{config.output_dir} holds a finished run, so there is nothing to do")
        report(last_line(config))
        return
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = load_policy(config.policy, precision=config.precision, device=chosen_device(config.device))
    prompts, held_out = prompts_and_held_out(config, checkpoint, report)
    address, sha256 = ServiceAddress.of(config.service_url, config), checkpoint.manifest.tokenizer_sha256
    with connected(address, sha256, report, signal=config.signal, with_kl=config.baseline == "kl") as rewards:
        check_room_at_service(rewards.card.max_length_tokens, prompts, config.max_new_tokens)
        opened = open_run("dpr", config)
        identity = {"policy": checkpoint.manifest.weights_sha256, "prompts": prompts_sha256(prompts)}
        pin(opened, {**identity, "reward model": rewards.card.revision})
        report(f"{len(prompts)} prompts, {len(held_out)} held out; rewards from {rewards.card.sft}")
        learner = Learner.of(config, checkpoint.policy)
        training = Training(config, checkpoint, learner, prompts, held_out, opened, metrics_of(config, opened))
        train_policy(training, rewards, report)
    write_policy(config, checkpoint, training.run, training.learner.result.model, prompts)
    training.states.remove()
    report(last_line(config))


def metrics_of(config: DprConfig, opened: Run) -> MetricsLog:
    """metrics.jsonl and the trackers."""
    done = TrainingStates(opened.folder / "resume").newest_step()
    trackers = open_trackers(config.report_to, opened, redacted(config.model_dump(mode="json")), done)
    return MetricsLog(opened.folder / METRICS_NAME, trackers)


def train_policy(training: Training, rewards: TokenRewards, report: Report) -> None:
    """Runs the steps that are not done yet, each on new samples of the current policy."""
    config, learner = training.config, training.learner
    newest = training.states.newest()
    done = 0 if newest is None else newest[0]
    # Step 0 is the evaluation before the first step. No state is saved after it, so without a state it runs again.
    training.metrics.drop_after(done or -1)
    if newest is not None:
        learner.restore(newest[1])
        report(f"resuming after step {done}")
    else:
        log_held_out_metrics(training, rewards, 0)
    samples = config.prompts_per_step * config.group_size
    with Progress(config.steps, "steps", done) as progress:
        for step in range(done + 1, config.steps + 1):
            metrics = learner.step(step, training.prompts, rewards)
            training.metrics.append(step, metrics)
            if due(step, config.evaluate_every, config.steps):
                log_held_out_metrics(training, rewards, step)
            if due(step, config.save_every, config.steps):
                training.states.save(step, learner.state())
            note = f"reward {metrics['reward_sum']:.2f}, kl {metrics['kl_to_sft']:.2f}"
            progress.advance(tokens=round(metrics["length_mean"] * samples), note=note)


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps, and after the last one, is due after `step`."""
    return step % every == 0 or step == last


def log_held_out_metrics(training: Training, rewards: TokenRewards, step: int) -> None:
    """Adds the held-out figures of the policy after `step` to the metrics, and redraws the plot."""
    if training.held_out:
        options = training.config.held_out_options
        result, _ = measure_held_out(
            replace(training.checkpoint, policy=training.learner.result), training.held_out, options, rewards
        )
        numbers = {f"held_out_{name}": value for name, value in result.numbers().items()}
        training.metrics.append(step, numbers)
    plot_run(training.metrics.read(), training.run.folder / "dpr.png")
