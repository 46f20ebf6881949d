"""Metrics of a policy on held-out prompts: accuracy, likelihood of the demonstrations, length, KL to the SFT model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import sqrt
from typing import TypeVar

import numpy as np
from dense_reward.records import IdArray
from dense_reward.text.encode import Encoder

from dense_reward_trainer.configs.dpr import HeldOutOptions
from dense_reward_trainer.data.final_answers import MissingExtraError, answer_of, is_right, right_answer
from dense_reward_trainer.data.sources import DataError
from dense_reward_trainer.data.tokenised import TokenisedRow
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.policy import Policy, PolicyCheckpoint, frozen_logprobs
from dense_reward_trainer.rl.records import OnBatch, Rollout, TokenRewards
from dense_reward_trainer.rl.sampling import Sampling, sample, sampled_logprobs

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `count` prompts and its standard error, null for a single prompt.

    Samples of one prompt are not independent, so they are averaged first. The error is the standard deviation over
    prompts, with count - 1 in its denominator, over the root of count.
    """

    value: float
    standard_error: float | None
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
    log-likelihood of the demonstrations at temperature 1 and without truncation, in nats, end of turn included. Lengths
    are tokens of sampled responses. `kl_to_sft` is the mean over samples of log pi(y) - log pi_sft(y), in nats per
    response, where pi is the policy that was sampled, with its temperature, truncation and tilt; null without a
    service. Of a policy that chooses among samples, the figures are those of the chosen ones; the likelihood, the KL
    and the greedy figures are null.
    """

    greedy_accuracy: Estimate | None
    sampled_accuracy: Estimate | None
    nll_per_token: float | None
    length_tokens: Estimate
    truncated: Estimate
    greedy_truncated: Estimate | None
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


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Samples from a policy, `sampling.group_size` for each prompt, in the order of the prompts."""

    rollouts: Sequence[Rollout]
    sampling: Sampling

    def first(self, size: int) -> "Drawn":
        """The first `size` samples for each prompt."""
        rollouts = first_of_groups(self.rollouts, self.sampling.group_size, size)
        return Drawn(rollouts, replace(self.sampling, group_size=min(size, self.sampling.group_size)))


def first_of_groups(values: Sequence[T], group_size: int, size: int) -> list[T]:
    """The first `size` of each `group_size` values."""
    return [value for b, value in enumerate(values) if b % group_size < size]


def held_out_sampling(options: HeldOutOptions) -> Sampling:
    """How `options` sample: at temperature 1, without truncation."""
    return Sampling(options.max_new_tokens, options.samples_per_prompt, batch_size=options.batch_size)


def draw_held_out(
    checkpoint: PolicyCheckpoint,
    rows: Sequence[TokenisedRow],
    options: HeldOutOptions,
    sampling: Sampling,
    on_batch: OnBatch | None = None,
) -> Drawn:
    """Samples for the first `options.limit` prompts. `on_batch` is called with each batch of them.

    Raises ValueError if there is no prompt, ConfigError if one leaves no room for `max_new_tokens`, and DataError if
    the checker cannot judge an answer.
    """
    if not rows:
        raise ValueError("there is nothing to measure: no held-out prompt was given")
    rows = rows[: options.limit]
    for row in rows:
        wanted_answer(row, checkpoint.encoder, options)
    prompts = [row.encoded.prompt_P for row in rows]
    return Drawn(sample(checkpoint.policy, prompts, sampling, options.seed, on_batch), sampling)


def measure_held_out(
    checkpoint: PolicyCheckpoint,
    rows: Sequence[TokenisedRow],
    options: HeldOutOptions,
    rewards: TokenRewards | None = None,
    drawn: Drawn | None = None,
    *,
    on_batch: OnBatch | None = None,
) -> tuple[HeldOutResult, list[SampledResponse]]:
    """Metrics from one greedy response and several samples for every prompt, and the responses.

    `rewards` gives the SFT model's log-probs. `drawn`: the samples; None draws them at temperature 1. `on_batch` is
    called with each batch of responses. Raises what `draw_held_out` raises.
    """
    if drawn is None:
        drawn = draw_held_out(checkpoint, rows, options, held_out_sampling(options), on_batch)
    rows, size = rows[: options.limit], drawn.sampling.group_size
    prompts = [row.encoded.prompt_P for row in rows]
    greedily = replace(drawn.sampling, group_size=1, greedy=True)
    greedy = sample(checkpoint.policy, prompts, greedily, options.seed, on_batch)
    greedy_records = sampled_responses(checkpoint.encoder, rows, greedy, options, greedy=True)
    records = sampled_responses(checkpoint.encoder, rows, drawn.rollouts, options, greedy=False)
    kl = None if rewards is None else _kl_to_sft(checkpoint.policy, drawn, rewards, options.microbatch_tokens)
    result = HeldOutResult(
        greedy_accuracy=accuracy(greedy_records, 1),
        sampled_accuracy=accuracy(records, size),
        nll_per_token=_nll_per_token(checkpoint.policy, rows, options.microbatch_tokens),
        length_tokens=estimate([len(rollout.response_T) for rollout in drawn.rollouts], size),
        truncated=estimate([not rollout.finished for rollout in drawn.rollouts], size),
        greedy_truncated=estimate([not rollout.finished for rollout in greedy], 1),
        kl_to_sft=kl,
    )
    return result, greedy_records + records


def estimate(values: Sequence[float], group_size: int) -> Estimate:
    """Mean and standard error of values in the order of the prompts, `group_size` values for each prompt.

    Raises ValueError for no value, and for one that is not finite.
    """
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"a mean needs finite values, but these are {list(values)[:10]}")
    mean_P = np.asarray(values, dtype=np.float64).reshape(-1, group_size).mean(axis=1)
    error = float(mean_P.std(ddof=1)) / sqrt(len(mean_P)) if len(mean_P) > 1 else None
    return Estimate(float(mean_P.mean()), error, len(mean_P))


def accuracy(records: Sequence[SampledResponse], group_size: int) -> Estimate | None:
    """Over the prompts whose answer is known; None if there is none."""
    known = [record.right for record in records if record.right is not None]
    return estimate(known, group_size) if known else None


def wanted_answer(row: TokenisedRow, encoder: Encoder, options: HeldOutOptions) -> str | None:
    """The right answer, None if it is not known. Raises DataError if the checker can never find it.

    The demonstration is read from its ids, as samples are: a template can write more than the words of a message, such
    as tool calls.
    """
    demonstration = row.demonstration
    text = _text(row.encoded.responses[0].ids_T[:-1], encoder)
    try:
        return right_answer(text, demonstration.answer, options.checker)
    except MissingExtraError as error:
        raise ConfigError(f"held_out_options.checker: {error}") from error
    except ValueError as error:
        raise DataError(
            f"{demonstration.source}: {error}: set held_out_options.checker to final_answer or exact"
        ) from error


def sampled_responses(
    encoder: Encoder,
    rows: Sequence[TokenisedRow],
    rollouts: Sequence[Rollout],
    options: HeldOutOptions,
    *,
    greedy: bool,
) -> list[SampledResponse]:
    """The responses as text, judged; equally many for each row, in the order of the rows."""
    size = len(rollouts) // len(rows)
    wanted = [wanted_answer(row, encoder, options) for row in rows]
    return [
        _record(rows[b // size], rollout, encoder, options, wanted[b // size], greedy=greedy)
        for b, rollout in enumerate(rollouts)
    ]


def _record(
    row: TokenisedRow, rollout: Rollout, encoder: Encoder, options: HeldOutOptions, wanted: str | None, *, greedy: bool
) -> SampledResponse:
    """A response that was cut off has no answer: its last line may be half a number."""
    text = _text(rollout.response_T[:-1] if rollout.finished else rollout.response_T, encoder)
    answer = answer_of(text, options.checker) if rollout.finished else None
    right = None if wanted is None else rollout.finished and is_right(text, wanted, options.checker)
    source = row.demonstration.source
    return SampledResponse(source, greedy, text, answer, wanted, right, rollout.finished, len(rollout.response_T))


def _text(ids_T: IdArray, encoder: Encoder) -> str:
    return encoder.tokenizer.text_and_spans([int(i) for i in ids_T])[0]


def _nll_per_token(policy: Policy, rows: Sequence[TokenisedRow], microbatch_tokens: int) -> float:
    prompts, responses = [row.encoded.prompt_P for row in rows], [row.encoded.responses[0].ids_T for row in rows]
    logprob_BT = frozen_logprobs(policy, prompts, responses, microbatch_tokens)
    return -float(logprob_BT.double().sum()) / sum(len(ids) for ids in responses)


def _kl_to_sft(policy: Policy, drawn: Drawn, rewards: TokenRewards, microbatch_tokens: int) -> Estimate:
    own_BT = sampled_logprobs(policy, drawn.rollouts, drawn.sampling, microbatch_tokens)
    own_B = own_BT.double().sum(dim=1).tolist()
    sft_B = [float(scored.sft_logprob_T.sum(dtype=np.float64)) for scored in rewards.score(drawn.rollouts)]
    return estimate([own - sft for own, sft in zip(own_B, sft_B, strict=True)], drawn.sampling.group_size)
