"""The `gradient` job: where does the gradient of a DPR run point before its first step?

Samples, rewards and estimator are those of the run. The gradient of its first update, before AdamW scales it, is
compared with the gradient that makes held-out demonstrations likelier. This takes minutes, and shows whether hours of
training with this reward and estimator can help, and with which reference. It cannot see whether the demonstrations
are better than the model that SFT started from: the credit job can. Read from `run` downwards.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from math import inf

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import IdArray, Report
from dense_reward.schemas import ModelCard
from torch import Tensor

from dense_reward_trainer.configs.dpr import DprConfig, GradientConfig
from dense_reward_trainer.credit.alignment import (
    Alignment,
    alignment,
    alignment_lines,
    alignment_verdict,
    best_reference,
)
from dense_reward_trainer.data.tokenised import TokenisedRow, rows_sha256
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.rl.learner import Learner, flat_gradient
from dense_reward_trainer.rl.policy import Policy, PolicyCheckpoint, load_policy, microbatches, policy_logprobs
from dense_reward_trainer.rl.prompts import check_room_at_service, prompts_and_held_out, prompts_sha256
from dense_reward_trainer.rl.records import TokenRewards
from dense_reward_trainer.rl.reward_service import PinnedPair, ServiceAddress, ServiceRewards, pinned_pairs
from dense_reward_trainer.runs.kept_parts import KeptParts, inputs_of_config
from dense_reward_trainer.runs.next_step import again, finished, job, more_in
from dense_reward_trainer.runs.progress import Progress
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.runs.timer import Timer


def run(config: GradientConfig, report: Report) -> dict[str, Alignment]:
    """Writes `gradient.json` to `config.output_dir` and reports it. Returns the alignment by name of the pair.

    A stopped job goes on with the pairs that it has not measured.
    Raises ConfigError, DataError, CheckpointError or JobError; the message states the cure.
    """
    check_run("gradient", config)
    if config.held_out is None:
        raise ConfigError("held_out is null: set it to held_out.jsonl of the SFT run, whose responses are the target")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = load_policy(config.policy, precision=config.precision, device=chosen_device(config.device))
    prompts, held_out = prompts_and_held_out(config, checkpoint, report)
    rows = held_out[: config.held_out_options.limit]
    parts = KeptParts(config.output_dir / "parts", report, _inputs(config, checkpoint, prompts, rows))
    with pinned_pairs(ServiceAddress.of(config.service_url, config), config.pair_names, report) as pairs:
        for pair in pairs:
            pair.check_tokenizer(checkpoint.manifest.tokenizer_sha256)
            check_room_at_service(pair.card.max_length_tokens, prompts, config.max_new_tokens)
        found = _alignments(config, checkpoint.policy, prompts, rows, pairs=pairs, parts=parts)
    verdict = [*alignment_verdict(found)]
    _save(found, verdict, len(rows), [pair.card for pair in pairs], config)
    report("\n".join([*alignment_lines(found), *verdict]))
    report(finished(config.output_dir / "gradient.json", _next_step(config, found)))
    return found


def _inputs(
    config: GradientConfig, checkpoint: PolicyCheckpoint, prompts: Sequence[IdArray], rows: Sequence[TokenisedRow]
) -> dict[str, str]:
    """What the gradients depend on, by name, beside the pair."""
    return {
        **inputs_of_config(config),
        "the policy's weights": checkpoint.manifest.weights_sha256,
        "the prompts": prompts_sha256(prompts),
        "the held-out rows": rows_sha256(rows),
    }


def _alignments(
    config: GradientConfig,
    policy: Policy,
    prompts: Sequence[IdArray],
    rows: Sequence[TokenisedRow],
    *,
    pairs: Sequence[PinnedPair],
    parts: KeptParts,
) -> dict[str, Alignment]:
    """The alignment under each pair, kept as soon as it is measured."""

    @cache
    def target() -> Tensor:
        held_out_prompts = [row.encoded.prompt_P for row in rows]
        held_out_responses = [row.encoded.responses[0].ids_T for row in rows]
        return likelihood_gradient(policy, held_out_prompts, held_out_responses, config.microbatch_tokens)

    def measure(pair: PinnedPair) -> Alignment:
        # the batches of every reference have the same samples: they depend on the seed and the policy only
        parts.report(f"{config.batches} batches with the reference {pair.card.name}: {pair.card.reference}")
        rewards = ServiceRewards(pair, config.signal, with_kl=config.baseline == "kl")
        return alignment(descent_directions(config, policy, prompts, rewards), target())

    return {
        pair.card.name: parts.get(
            pair.card.name, Alignment, partial(measure, pair), {"the pair of the service": pair.card.revision}
        )
        for pair in pairs
    }


def _next_step(config: GradientConfig, found: Mapping[str, Alignment]) -> str:
    """Train on the reference that helps most; if none does, look at more batches."""
    helping = best_reference(found)
    if helping is None:
        more: dict[str, object] = {"batches": 2 * config.batches, "output_dir": more_in(config.output_dir, "more")}
        return f"{again('gradient', config, more)}, or another reference"
    values = {name: getattr(config, name) for name in DprConfig.model_fields}
    values |= {"service_pair": helping, "output_dir": more_in(config.output_dir, "dpr")}
    return job("dpr", DprConfig, values, default="dpr_full", match="policy")


def _save(
    found: Mapping[str, Alignment],
    verdict: Sequence[str],
    held_out: int,
    cards: Sequence[ModelCard],
    config: GradientConfig,
) -> None:
    record = {
        "alignments": {name: asdict(one) for name, one in found.items()},
        "verdict": verdict,
        "held_out": held_out,
        "rewards": {card.name: card.model_dump(include={"sft", "reference", "revision"}) for card in cards},
    }
    folder = open_run("gradient", config).folder
    write_whole(folder / "gradient.json", json.dumps(record, indent=2).encode() + b"\n")


def descent_directions(
    config: GradientConfig, policy: Policy, prompts: Sequence[IdArray], rewards: TokenRewards
) -> Iterator[Tensor]:
    """For each batch of samples, minus the gradient of its first update, flattened. The policy does not change.

    Raises JobError if a gradient is 0 or not finite.
    """
    learner = Learner.of(config, policy)
    steps = Progress(config.batches, "batches").each(range(1, config.batches + 1), lambda _: 0)
    for step in steps:
        direction = -learner.gradient(learner.sample_batch(step, prompts, rewards, Timer()))
        size = float(direction.norm())
        if not 0 < size < inf:
            raise JobError(
                f"the gradient of batch {step} has norm {size:g}, so it has no direction: it is 0 if all actions of a "
                "batch get the same reward. Raise prompts_per_step or group_size, or inspect the rewards"
            )
        yield direction


def likelihood_gradient(
    policy: Policy, prompts: Sequence[IdArray], responses: Sequence[IdArray], microbatch_tokens: int
) -> Tensor:
    """Gradient of the summed log-likelihood of given responses, flattened."""
    policy.model.zero_grad(set_to_none=True)
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, responses, strict=True)]
    for part in microbatches(lengths, microbatch_tokens):
        logprob_BT = policy_logprobs(policy, [prompts[b] for b in part], [responses[b] for b in part])
        torch.autograd.backward(logprob_BT.sum())
    return flat_gradient(policy.model)
