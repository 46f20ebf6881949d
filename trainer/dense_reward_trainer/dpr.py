"""Dense-Path REINFORCE (arXiv 2510.02493): a policy improved on token rewards, as a client of the reward service.

`train` is the algorithm. Every step samples G responses to each of its prompts, asks the service for the reward of
every token, pays it less b (log pi - log pi_sft), and takes one REINFORCE step on the reward-to-go less a baseline.
No critic, no reference model, no SFT model is loaded here. What the paper leaves open is an option of DprConfig.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from dense_reward.engine.base import IdArray
from dense_reward.engine.probe import ProbeIds
from dense_reward.engine.seal import Facts
from dense_reward.manifest import files_folder
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm
from transformers import AutoTokenizer

from dense_reward_trainer.checkpoint import is_complete, recover, write_checkpoint
from dense_reward_trainer.dpr_plot import plot_run
from dense_reward_trainer.encoding import Row
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.heldout import measure
from dense_reward_trainer.losses import divisor, reinforce
from dense_reward_trainer.optimiser import learning_rate, make_optimiser, set_learning_rate
from dense_reward_trainer.policy import (
    Policy,
    PolicyCheckpoint,
    chosen_device,
    frozen_logprobs,
    load_policy,
    microbatches,
    policy_logprobs,
)
from dense_reward_trainer.policy_config import DprConfig
from dense_reward_trainer.prompts import (
    check_disjoint,
    check_room_at_service,
    held_out_rows,
    prompts_of_step,
    prompts_sha256,
    training_prompts,
)
from dense_reward_trainer.returns import baseline, mask_of, pad, penalised, reward_to_go, whitened
from dense_reward_trainer.rollout import Rollout, Sampling, sample
from dense_reward_trainer.runlog import METRICS_NAME, MetricsLog, Run, check_run, open_run, pin
from dense_reward_trainer.stopwatch import Stopwatch
from dense_reward_trainer.token_rewards import ResponseRewards, ServiceAddress, TokenRewards, connected
from dense_reward_trainer.training_state import TrainingStates

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """All that a run works on. The policy and the optimiser change from step to step, nothing else does."""

    config: DprConfig
    checkpoint: PolicyCheckpoint
    optimiser: AdamW
    prompts: Sequence[IdArray]
    held_out: Sequence[Row]
    run: Run

    @property
    def metrics(self) -> MetricsLog:
        return MetricsLog(self.run.folder / METRICS_NAME)

    @property
    def states(self) -> TrainingStates:
        return TrainingStates(self.run.folder / "resume")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rollouts of a step and what is known of each token, [B, T]; log-probs and rewards are at temperature 1."""

    rollouts: Sequence[Rollout]
    mask_BT: Tensor
    signal_BT: Tensor
    policy_logprob_BT: Tensor
    sft_logprob_BT: Tensor
    kl_BT: Tensor | None


def run(config: DprConfig, report: Report) -> None:
    """Train, and leave `checkpoints/policy` in `config.output_dir`; a finished run is left alone, a killed one goes on.

    Raises ConfigError, DataError, CheckpointError or JobError, naming the cure.
    """
    check_run("dpr", config)
    finished = config.output_dir / "checkpoints" / "policy"
    recover(finished)
    if is_complete(finished):
        TrainingStates(config.output_dir / "resume").remove()
        report(f"{config.output_dir} holds a finished run, so there is nothing to do: {finished}")
        return
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = load_policy(config.policy, precision=config.precision, device=chosen_device(config.device))
    prompts, held_out = load_prompts(config, checkpoint, report)
    address, sha256 = ServiceAddress.of(config.service_url, config), checkpoint.manifest.tokenizer_sha256
    with connected(address, sha256, report, signal=config.signal, with_kl=config.baseline == "kl") as rewards:
        check_room_at_service(rewards.card.max_length_tokens, prompts, config.max_new_tokens)
        started = open_run("dpr", config)
        identity = {"policy": checkpoint.manifest.weights_sha256, "prompts": prompts_sha256(prompts)}
        pin(started, {**identity, "reward model": rewards.card.revision})
        report(f"{len(prompts)} prompts, {len(held_out)} held out; rewards of {rewards.card.sft}")
        optimiser = make_optimiser(config, checkpoint.policy.model)
        training = Training(config, checkpoint, optimiser, prompts, held_out, started)
        train(training, rewards, report)
    write_policy(training)
    training.states.remove()
    report(f"finished: {finished}")


def train(training: Training, rewards: TokenRewards, report: Report) -> None:
    """The steps of `training.config` that are not done yet, each on fresh samples of the policy as it is."""
    config, policy = training.config, training.checkpoint.policy
    done = training.states.restore(policy.model, training.optimiser)
    # the evaluation before the first step has no state of its own
    training.metrics.drop_after(done or -1)
    if done:
        report(f"resuming after step {done}")
    else:
        evaluate(training, rewards, 0)
    with tqdm(total=config.steps, initial=done, unit="step", dynamic_ncols=True) as bar:
        for step in range(done + 1, config.steps + 1):
            clock = Stopwatch()
            prompts = prompts_of_step(training.prompts, step, config.prompts_per_step, config.seed)
            rollouts = sample(policy, prompts, sampling_of(config), seed_of(config.seed, step))
            clock.lap("rollout_s")
            scored = rewards.score(rollouts)
            clock.lap("score_s")
            batch = assemble(policy, rollouts, scored, config.microbatch_tokens)
            return_BT = returns(batch, config)
            advantage_BT = advantages(return_BT, batch, config)
            set_learning_rate(training.optimiser, learning_rate(config, step))
            loss, grad_norm = update(policy, training.optimiser, batch, advantage_BT, config)
            clock.lap("update_s")

            described = describe(batch, return_BT)
            outcome = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate(config, step)}
            training.metrics.append(step, described | outcome | clock.report(int(batch.mask_BT.sum())))
            if due(step, config.evaluate_every, config.steps):
                evaluate(training, rewards, step)
            if due(step, config.save_every, config.steps):
                training.states.save(step, policy.model, training.optimiser)
            bar.set_postfix_str(
                f"reward {described['reward_sum']:.2f} kl {described['kl_to_sft']:.2f} "
                f"length {described['length_mean']:.0f}"
            )
            bar.update()


def load_prompts(
    config: DprConfig, checkpoint: PolicyCheckpoint, report: Report
) -> tuple[Sequence[IdArray], Sequence[Row]]:
    """Prompts to train on and rows to evaluate on, which share none. Raises DataError."""
    encoder, limit_tokens = checkpoint.encoder, checkpoint.policy.limit_tokens
    prompts = training_prompts(config.prompts, encoder, limit_tokens, config.max_new_tokens, report)
    if config.held_out is None:
        return prompts, ()
    held_out = held_out_rows(config.held_out, encoder, limit_tokens, config.held_out_options.max_new_tokens)
    check_disjoint(prompts, held_out)
    return prompts, held_out


def sampling_of(config: DprConfig) -> Sampling:
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        group_size=config.group_size,
        temperature=config.temperature,
        batch_size=config.rollout_batch_size,
    )


def seed_of(seed: int, step: int) -> int:
    """A seed for the samples of one step, so that a resumed run draws what an unbroken one would have drawn."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def assemble(
    policy: Policy, rollouts: Sequence[Rollout], scored: Sequence[ResponseRewards], microbatch_tokens: int
) -> Batch:
    """Rollouts with their rewards, and the policy's own log-probs at temperature 1 before the step.

    A response that was cut off has no end of turn, so nothing is paid for one: rewards are those of its ids alone.
    """
    prompts, responses = [rollout.prompt_P for rollout in rollouts], [rollout.response_T for rollout in rollouts]
    kl_rows = [rewards.kl_T for rewards in scored if rewards.kl_T is not None]
    return Batch(
        rollouts=rollouts,
        mask_BT=mask_of([len(ids) for ids in responses]),
        signal_BT=pad([rewards.signal_T for rewards in scored]),
        policy_logprob_BT=frozen_logprobs(policy, prompts, responses, microbatch_tokens),
        sft_logprob_BT=pad([rewards.sft_logprob_T for rewards in scored]),
        kl_BT=pad(kl_rows) if len(kl_rows) == len(rollouts) else None,
    )


def returns(batch: Batch, config: DprConfig) -> Tensor:
    """Reward-to-go of the signal less the KL penalty, [B, T]."""
    signal_BT = batch.signal_BT
    if config.reward_clip is not None:
        signal_BT = signal_BT.clamp(-config.reward_clip, config.reward_clip)
    paid_BT = penalised(signal_BT, batch.policy_logprob_BT, batch.sft_logprob_BT, config.kl_coefficient)
    return reward_to_go(paid_BT, batch.mask_BT, config.gamma)


def advantages(return_BT: Tensor, batch: Batch, config: DprConfig) -> Tensor:
    """Returns less the baseline, [B, T], 0 on padding."""
    advantage_BT = return_BT - baseline(config.baseline, return_BT, config.group_size, batch.kl_BT)
    advantage_BT = advantage_BT * batch.mask_BT
    return whitened(advantage_BT, batch.mask_BT) if config.whiten else advantage_BT


def update(
    policy: Policy, optimiser: AdamW, batch: Batch, advantage_BT: Tensor, config: DprConfig
) -> tuple[float, float]:
    """One optimiser step on the whole batch; its loss and the gradient's norm before clipping.

    Log-probs are at the sampling temperature. Raises JobError, and leaves the weights alone, where the gradient is not
    finite.
    """
    over = divisor(batch.mask_BT, config.normalise)
    lengths = [len(rollout.prompt_P) + len(rollout.response_T) for rollout in batch.rollouts]
    optimiser.zero_grad(set_to_none=True)
    loss = 0.0
    for rows in microbatches(lengths, config.microbatch_tokens):
        chosen = [batch.rollouts[b] for b in rows]
        logprob_bt = policy_logprobs(
            policy, [r.prompt_P for r in chosen], [r.response_T for r in chosen], config.temperature
        )
        part = (rows, slice(logprob_bt.shape[1]))
        advantage_bt, mask_bt = advantage_BT[part].to(policy.device), batch.mask_BT[part].to(policy.device)
        part_loss = reinforce(logprob_bt, advantage_bt, mask_bt, over)
        torch.autograd.backward(part_loss)
        loss += float(part_loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm))
    if not math.isfinite(norm):
        raise JobError(
            f"the gradient's norm is {norm}: training has diverged; start in another output_dir with a lower "
            "learning_rate or a higher kl_coefficient"
        )
    optimiser.step()
    return loss, norm


def describe(batch: Batch, return_BT: Tensor) -> dict[str, float]:
    """What the samples of a step were like. KL and entropy are estimates from these samples, in nats."""
    log_ratio_BT = (batch.policy_logprob_BT - batch.sft_logprob_BT) * batch.mask_BT
    tokens, responses = float(batch.mask_BT.sum()), len(batch.rollouts)
    return {
        "reward_mean": float(batch.signal_BT.sum()) / tokens,
        "reward_sum": float(batch.signal_BT.sum()) / responses,
        "return_mean": float(return_BT[:, 0].mean()),
        "kl_to_sft": float(log_ratio_BT.sum()) / responses,
        "kl_to_sft_per_token": float(log_ratio_BT.sum()) / tokens,
        "entropy": -float(batch.policy_logprob_BT.sum()) / tokens,
        "length_mean": tokens / responses,
        "truncated": sum(not rollout.finished for rollout in batch.rollouts) / responses,
    }


def due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def evaluate(training: Training, rewards: TokenRewards, step: int) -> None:
    """Held-out figures of the policy as it is after `step`, into the metrics; and the plot anew."""
    if training.held_out:
        options = training.config.held_out_options
        result, _ = measure(training.checkpoint, training.held_out, options, rewards)
        numbers = {f"held_out_{name}": value for name, value in result.numbers().items()}
        training.metrics.append(step, numbers)
    plot_run(training.metrics.read(), training.run.folder / "dpr.png")


def write_policy(training: Training) -> None:
    """The final policy as a checkpoint that a service or another job takes, probed as the one that it came from."""
    config, manifest = training.config, training.checkpoint.manifest
    probe = [ProbeIds(s.prompt_ids, tuple(response.ids for response in s.responses)) for s in manifest.probe]
    facts = Facts(
        role="policy",
        run_id=training.run.run_id,
        renderer=manifest.renderer,
        end_of_turn_id=manifest.end_of_turn_id,
        optimiser_step=config.steps,
        learning_rate=learning_rate(config, config.steps),
        base_model=str(config.policy),
        data_sha256=prompts_sha256(training.prompts),
        seed=config.seed,
    )
    write_checkpoint(
        training.run.folder / "checkpoints" / "policy",
        training.checkpoint.policy.model,
        AutoTokenizer.from_pretrained(
            files_folder(config.policy, manifest), local_files_only=True, trust_remote_code=False
        ),
        facts,
        lambda *_: probe,
        device=str(training.checkpoint.policy.device),
    )
