"""Metrics of a policy on held-out prompts: accuracy, likelihood of the demonstrations, length, KL to the SFT model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import sqrt

import numpy as np
from dense_reward.text.encode import Encoder

from dense_reward_trainer.configs.dpr import HeldOutOptions
from dense_reward_trainer.data.sources import final_answer
from dense_reward_trainer.data.tokenised import TokenisedRow
from dense_reward_trainer.rl.policy import Policy, PolicyCheckpoint, frozen_logprobs
from dense_reward_trainer.rl.records import Rollout, TokenRewards
from dense_reward_trainer.rl.sampling import Sampling, sample


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `count` prompts and its standard error.

    Samples of one prompt are not independent, so they are averaged first. With one response to each prompt, each right
    or wrong, the error is that of a proportion.
    """

    value: float
    standard_error: float
    count: int


@dataclass(frozen=True, slots=True)
class SampledResponse:
    """One response, for people to read; `right` is null if no answer is known."""

    source: str
    greedy: bool
    text: str
    answer: str | None
    wanted: str | None
    right: bool | None
    finished: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """Metrics of one policy.

    Accuracies are over the prompts whose answer is known, null if there is none. `nll_per_token` is the negative
    log-likelihood of the demonstrations, in nats, end of turn included. Lengths are tokens of sampled responses.
    `kl_to_sft` is the mean over samples of log pi(y) - log pi_sft(y), in nats per response; null without a service.
    """

    greedy_accuracy: Estimate | None
    sampled_accuracy: Estimate | None
    nll_per_token: float
    length_tokens: Estimate
    truncated: Estimate
    greedy_truncated: Estimate
    kl_to_sft: Estimate | None

    def numbers(self) -> dict[str, float | None]:
        """All metrics by name, each standard error as `name_se`; null if the metric is null."""
        flat: dict[str, float | None] = {}
        for field in fields(self):
            value: Estimate | float | None = getattr(self, field.name)
            if isinstance(value, Estimate):
                flat |= {field.name: value.value, f"{field.name}_se": value.standard_error}
            else:
                flat[field.name] = value
        return flat


def measure_held_out(
    checkpoint: PolicyCheckpoint,
    rows: Sequence[TokenisedRow],
    options: HeldOutOptions,
    rewards: TokenRewards | None = None,
    temperature: float = 1.0,
) -> tuple[HeldOutResult, list[SampledResponse]]:
    """Metrics from one greedy response and several samples for every prompt, and the responses.

    `rewards` gives the SFT model's log-probs. All metrics are at `temperature`, except the likelihood of the
    demonstrations, which is at 1. Raises ValueError if there is no prompt, ConfigError if one leaves no room for
    `max_new_tokens`.
    """
    if not rows:
        raise ValueError("there is nothing to measure: no held-out prompt was given")
    policy, encoder, size = checkpoint.policy, checkpoint.encoder, options.samples_per_prompt
    rows = rows[: options.limit]
    prompts = [row.encoded.prompt_P for row in rows]
    sampling = Sampling(options.max_new_tokens, size, temperature, batch_size=options.batch_size)
    greedy = sample(policy, prompts, replace(sampling, group_size=1, greedy=True), options.seed)
    sampled = sample(policy, prompts, sampling, options.seed)
    records = [_record(row, rollout, encoder, greedy=True) for row, rollout in zip(rows, greedy, strict=True)]
    records += [_record(rows[b // size], rollout, encoder, greedy=False) for b, rollout in enumerate(sampled)]
    result = HeldOutResult(
        greedy_accuracy=_accuracy(records[: len(rows)], 1),
        sampled_accuracy=_accuracy(records[len(rows) :], size),
        nll_per_token=_nll_per_token(policy, rows, options.microbatch_tokens),
        length_tokens=estimate([len(rollout.response_T) for rollout in sampled], size),
        truncated=estimate([not rollout.finished for rollout in sampled], size),
        greedy_truncated=estimate([not rollout.finished for rollout in greedy], 1),
        kl_to_sft=None
        if rewards is None
        else _kl_to_sft(policy, sampled, rewards, sampling, options.microbatch_tokens),
    )
    return result, records


def estimate(values: Sequence[float], group_size: int) -> Estimate:
    """Mean and standard error of values in the order of the prompts, `group_size` values for each prompt."""
    mean_P = np.asarray(values, dtype=np.float64).reshape(-1, group_size).mean(axis=1)
    return Estimate(float(mean_P.mean()), float(mean_P.std()) / sqrt(len(mean_P)), len(mean_P))


def _record(row: TokenisedRow, rollout: Rollout, encoder: Encoder, *, greedy: bool) -> SampledResponse:
    """A response that was cut off has no answer: its last line may be half a number."""
    body_T = rollout.response_T[:-1] if rollout.finished else rollout.response_T
    text = encoder.tokenizer.text_and_spans([int(i) for i in body_T])[0]
    answer, wanted = final_answer(text) if rollout.finished else None, row.demonstration.answer
    right = None if wanted is None else answer == wanted
    source = row.demonstration.source
    return SampledResponse(source, greedy, text, answer, wanted, right, rollout.finished, len(rollout.response_T))


def _accuracy(records: Sequence[SampledResponse], group_size: int) -> Estimate | None:
    """Over the prompts whose answer is known."""
    known = [record.right for record in records if record.right is not None]
    return estimate(known, group_size) if known else None


def _nll_per_token(policy: Policy, rows: Sequence[TokenisedRow], microbatch_tokens: int) -> float:
    prompts, responses = [row.encoded.prompt_P for row in rows], [row.encoded.responses[0].ids_T for row in rows]
    logprob_BT = frozen_logprobs(policy, prompts, responses, microbatch_tokens)
    return -float(logprob_BT.double().sum()) / sum(len(ids) for ids in responses)


def _kl_to_sft(
    policy: Policy, sampled: Sequence[Rollout], rewards: TokenRewards, sampling: Sampling, microbatch_tokens: int
) -> Estimate:
    prompts, responses = [rollout.prompt_P for rollout in sampled], [rollout.response_T for rollout in sampled]
    own_BT = frozen_logprobs(policy, prompts, responses, microbatch_tokens, sampling.temperature)
    own_B = own_BT.double().sum(dim=1).tolist()
    sft_B = [float(scored.sft_logprob_T.sum(dtype=np.float64)) for scored in rewards.score(sampled)]
    return estimate([own - sft for own, sft in zip(own_B, sft_B, strict=True)], sampling.group_size)
