"""Where the gradient of a DPR run points before its first step: `dense-reward-train gradient RECIPE_OF_DPR`.

Samples, rewards and estimator are those of the run. The gradient of its first update, before AdamW scales it, is
compared with the one that makes held-out demonstrations likelier: minutes that tell whether hours of training with this
reward, reference and estimator can help.
Read from `run` downwards.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, sqrt
from statistics import mean, stdev

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.records import IdArray, Report
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from dense_reward_trainer.configs.dpr import GradientConfig
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.rl.learner import Learner, flat_gradient
from dense_reward_trainer.rl.policy import Policy, chosen_device, load_policy, microbatches, policy_logprobs
from dense_reward_trainer.rl.prompts import check_room_at_service, prompts_and_held_out
from dense_reward_trainer.rl.records import TokenRewards
from dense_reward_trainer.rl.reward_service import ServiceAddress, connected
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.runs.timer import Timer


@dataclass(frozen=True, slots=True)
class Alignment:
    """Directions of N batches of samples, compared with a target direction.

    `cosine`: of one batch with the target, mean over batches. `agreement`: cosine between two batches, mean over pairs;
    1 where batches bring no noise, and its error is that of batches which bring nothing else. `expected_cosine`: of the
    expected gradient with the target, cosine over the square root of the agreement, for a gradient that is the expected
    one and noise of its own; null where the agreement is within two errors of none.
    """

    cosine: float
    cosine_standard_error: float
    agreement: float
    agreement_standard_error: float
    expected_cosine: float | None
    expected_cosine_standard_error: float | None


def run(config: GradientConfig, report: Report) -> Alignment:
    """Leave `gradient.json` in `config.output_dir` and report it.

    Raises ConfigError, DataError, CheckpointError or JobError, naming the cure.
    """
    check_run("gradient", config)
    if config.held_out is None:
        raise ConfigError("held_out is null: name held_out.jsonl of the SFT run, whose answers are to become likelier")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = load_policy(config.policy, precision=config.precision, device=chosen_device(config.device))
    prompts, held_out = prompts_and_held_out(config, checkpoint, report)
    rows = held_out[: config.held_out_options.limit]
    address, sha256 = ServiceAddress.of(config.service_url, config), checkpoint.manifest.tokenizer_sha256
    with connected(address, sha256, report, signal=config.signal, with_kl=config.baseline == "kl") as rewards:
        check_room_at_service(rewards.card.max_length_tokens, prompts, config.max_new_tokens)
        folder = open_run("gradient", config).folder
        asked, right = [row.encoded.prompt_P for row in rows], [row.encoded.responses[0].ids_T for row in rows]
        target = likelihood_gradient(checkpoint.policy, asked, right, config.microbatch_tokens)
        found = alignment(descents(config, checkpoint.policy, prompts, rewards), target)
        identity = {"sft": rewards.card.sft, "reference": rewards.card.reference, "revision": rewards.card.revision}
    record = {"alignment": asdict(found), "held_out": len(rows), "rewards": identity}
    write_whole(folder / "gradient.json", json.dumps(record, indent=2).encode() + b"\n")
    report(described(found))
    return found


def descents(
    config: GradientConfig, policy: Policy, prompts: Sequence[IdArray], rewards: TokenRewards
) -> Iterator[Tensor]:
    """Of each batch of samples minus the gradient of its first update, all weights in one row; the policy stays.

    Raises JobError where that is 0 or not finite.
    """
    learner = Learner.of(config, policy)
    for step in tqdm(range(1, config.batches + 1), unit="batch", dynamic_ncols=True):
        direction = -learner.gradient(learner.sample_batch(step, prompts, rewards, Timer()))
        size = float(direction.norm())
        if not 0 < size < inf:
            raise JobError(
                f"the gradient of batch {step} has norm {size:g}: there is no direction where every action of a "
                "batch is paid the same; raise prompts_per_step or group_size, or look at the rewards"
            )
        yield direction


def likelihood_gradient(
    policy: Policy, prompts: Sequence[IdArray], responses: Sequence[IdArray], microbatch_tokens: int
) -> Tensor:
    """Gradient of the log-likelihood of given responses, summed, all weights in one row."""
    policy.model.zero_grad(set_to_none=True)
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, responses, strict=True)]
    for part in microbatches(lengths, microbatch_tokens):
        logprob_BT = policy_logprobs(policy, [prompts[b] for b in part], [responses[b] for b in part])
        torch.autograd.backward(logprob_BT.sum())
    return flat_gradient(policy.model)


def alignment(directions: Iterable[Tensor], target: Tensor) -> Alignment:
    """Of three directions or more with a target, none of them 0; two directions are held at a time.

    Raises ValueError for fewer than three.
    """
    unit = normalize(target, dim=0)
    total = torch.zeros_like(unit)
    cosines: list[float] = []
    neighbours: list[float] = []
    before = torch.zeros_like(unit)
    for direction in directions:
        found = normalize(direction, dim=0)
        cosines.append(float(found @ unit))
        neighbours.append(float(found @ before))
        total += found
        before = found
    count = len(cosines)
    if count < 3:
        raise ValueError(f"agreement is between batches, and there is {count}: at least 3 are needed")
    cosine, error = mean(cosines), stdev(cosines) / sqrt(count)
    agreement = (float(total.double().square().sum()) - count) / (count * (count - 1))
    # cosines of independent directions are uncorrelated, also of pairs that share one
    noise = stdev(neighbours[1:]) / sqrt(count * (count - 1) / 2)
    if agreement <= 2 * noise:
        return Alignment(cosine, error, agreement, noise, None, None)
    expected = cosine / sqrt(agreement)
    spread = sqrt((error / sqrt(agreement)) ** 2 + (expected * noise / (2 * agreement)) ** 2)
    return Alignment(cosine, error, agreement, noise, expected, spread)


def described(found: Alignment) -> str:
    """For people."""
    expected, error = found.expected_cosine, found.expected_cosine_standard_error
    known = "it cannot be told from the noise: more batches" if expected is None else f"{expected:.2f} ± {error:.2f}"
    return (
        f"cosine with the gradient of the held-out log-likelihood: {found.cosine:.3f} ± "
        f"{found.cosine_standard_error:.3f} for one batch, whose cosine with another is {found.agreement:.3f} ± "
        f"{found.agreement_standard_error:.3f}; "
        f"of the expected gradient {known}"
    )
