"""The `gradient` job: where does the gradient of a DPR run point before its first step?

Samples, rewards and estimator are those of the run. The gradient of its first update, before AdamW scales it, is
compared with the gradient that makes held-out demonstrations likelier. This takes minutes, and shows whether hours of
training with this reward, reference and estimator can help. Read from `run` downwards.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, sqrt
from statistics import mean, stdev

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import IdArray, Report
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from dense_reward_trainer.configs.dpr import GradientConfig
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.rl.learner import Learner, flat_gradient
from dense_reward_trainer.rl.policy import Policy, load_policy, microbatches, policy_logprobs
from dense_reward_trainer.rl.prompts import check_room_at_service, prompts_and_held_out
from dense_reward_trainer.rl.records import TokenRewards
from dense_reward_trainer.rl.reward_service import ServiceAddress, connected
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.runs.timer import Timer


@dataclass(frozen=True, slots=True)
class Alignment:
    """Gradient directions of N batches of samples, compared with a target direction.

    `cosine`: between the direction of a batch and the target, mean over batches. `agreement`: cosine between two
    batches, mean over pairs; 1 if batches are noise-free; its standard error is computed under pure noise.
    `expected_cosine`: between the expected gradient and the target, cosine / sqrt(agreement), if each batch is the
    expected gradient plus independent noise; null if the agreement is within two standard errors of 0.
    """

    cosine: float
    cosine_standard_error: float
    agreement: float
    agreement_standard_error: float
    expected_cosine: float | None
    expected_cosine_standard_error: float | None


def run(config: GradientConfig, report: Report) -> Alignment:
    """Writes `gradient.json` to `config.output_dir` and reports it.

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
    address, sha256 = ServiceAddress.of(config.service_url, config), checkpoint.manifest.tokenizer_sha256
    with connected(address, sha256, report, signal=config.signal, with_kl=config.baseline == "kl") as rewards:
        check_room_at_service(rewards.card.max_length_tokens, prompts, config.max_new_tokens)
        folder = open_run("gradient", config).folder
        held_out_prompts = [row.encoded.prompt_P for row in rows]
        held_out_responses = [row.encoded.responses[0].ids_T for row in rows]
        target = likelihood_gradient(checkpoint.policy, held_out_prompts, held_out_responses, config.microbatch_tokens)
        found = alignment(descent_directions(config, checkpoint.policy, prompts, rewards), target)
        identity = {"sft": rewards.card.sft, "reference": rewards.card.reference, "revision": rewards.card.revision}
    record = {"alignment": asdict(found), "held_out": len(rows), "rewards": identity}
    write_whole(folder / "gradient.json", json.dumps(record, indent=2).encode() + b"\n")
    report(alignment_summary(found))
    return found


def descent_directions(
    config: GradientConfig, policy: Policy, prompts: Sequence[IdArray], rewards: TokenRewards
) -> Iterator[Tensor]:
    """For each batch of samples, minus the gradient of its first update, flattened. The policy does not change.

    Raises JobError if a gradient is 0 or not finite.
    """
    learner = Learner.of(config, policy)
    for step in tqdm(range(1, config.batches + 1), unit="batch", dynamic_ncols=True):
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


def alignment(directions: Iterable[Tensor], target: Tensor) -> Alignment:
    """Compares three or more directions with a target; none of them is 0. Holds two directions in memory at a time.

    Raises ValueError for fewer than three directions.
    """
    unit = normalize(target, dim=0)
    total = torch.zeros_like(unit)
    cosines: list[float] = []
    neighbours: list[float] = []
    previous = torch.zeros_like(unit)
    for direction in directions:
        current = normalize(direction, dim=0)
        cosines.append(float(current @ unit))
        neighbours.append(float(current @ previous))
        total += current
        previous = current
    count = len(cosines)
    if count < 3:
        raise ValueError(f"agreement needs at least 3 batches, but there are {count}")
    cosine, error = mean(cosines), stdev(cosines) / sqrt(count)
    # |sum of unit vectors|^2 = count + sum of the cosines of all ordered pairs
    agreement = (float(total.double().square().sum()) - count) / (count * (count - 1))
    # Under pure noise the cosines of two pairs of batches are uncorrelated, even if both pairs share a batch. So the
    # standard error over all pairs is the spread over neighbouring batches / sqrt(number of pairs).
    noise = stdev(neighbours[1:]) / sqrt(count * (count - 1) / 2)
    if agreement <= 2 * noise:
        return Alignment(cosine, error, agreement, noise, None, None)
    expected = cosine / sqrt(agreement)
    spread = sqrt((error / sqrt(agreement)) ** 2 + (expected * noise / (2 * agreement)) ** 2)
    return Alignment(cosine, error, agreement, noise, expected, spread)


def alignment_summary(found: Alignment) -> str:
    """The alignment as one line of text."""
    expected, error = found.expected_cosine, found.expected_cosine_standard_error
    known = "unknown, the noise hides it: raise batches" if expected is None else f"{expected:.2f} ± {error:.2f}"
    return (
        f"cosine with the gradient of the held-out log-likelihood: {found.cosine:.3f} ± "
        f"{found.cosine_standard_error:.3f} for one batch, whose cosine with another is {found.agreement:.3f} ± "
        f"{found.agreement_standard_error:.3f}; of the expected gradient: {known}"
    )
