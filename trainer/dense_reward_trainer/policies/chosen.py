"""Metrics of a policy that draws several samples for each prompt and chooses one as its answer. Must not know jobs."""

from collections.abc import Sequence

import numpy as np
from dense_reward.records import FloatArray

from dense_reward_trainer.configs.dpr import HeldOutOptions
from dense_reward_trainer.configs.evaluate import ChooseOptions
from dense_reward_trainer.credit.aggregates import aggregate
from dense_reward_trainer.data.tokenised import TokenisedRow
from dense_reward_trainer.policies.choice import by_majority, by_power, by_score
from dense_reward_trainer.policies.signals import SampleSignals
from dense_reward_trainer.rl.held_out_metrics import (
    Drawn,
    HeldOutResult,
    SampledResponse,
    accuracy,
    estimate,
    first_of_groups,
    sampled_responses,
)
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from dense_reward_trainer.rl.sampling import sampled_logprobs


def measure_chosen(
    checkpoint: PolicyCheckpoint,
    rows: Sequence[TokenisedRow],
    options: HeldOutOptions,
    drawn: Drawn,
    choose: ChooseOptions,
    *,
    signals: SampleSignals | None = None,
) -> tuple[HeldOutResult, list[SampledResponse]]:
    """Metrics of the chosen answers, and these answers. The first `choose.samples` of each prompt's samples compete.

    `signals`: those of all samples in `drawn`, in their order, if `choose` chooses by a signal.
    """
    drawn_size = drawn.sampling.group_size
    rows, drawn = rows[: options.limit], drawn.first(choose.samples)
    size = drawn.sampling.group_size
    records = sampled_responses(checkpoint.encoder, rows, drawn.rollouts, options, greedy=False)
    match choose.by:
        case "majority":
            groups = [records[start : start + size] for start in range(0, len(records), size)]
            picks = [by_majority([record.answer for record in group]) for group in groups]
        case "power":
            picks = _power_picks(checkpoint, drawn, options, choose.power or 1.0)
        case signal:
            values = first_of_groups([] if signals is None else signals[signal], drawn_size, size)
            picks = _best_picks(records, size, choose, values)
    chosen = [records[p * size + pick] for p, pick in enumerate(picks)]
    result = HeldOutResult(
        greedy_accuracy=None,
        sampled_accuracy=accuracy(chosen, 1),
        nll_per_token=None,
        length_tokens=estimate([record.tokens for record in chosen], 1),
        truncated=estimate([not record.finished for record in chosen], 1),
        greedy_truncated=None,
        kl_to_sft=None,
    )
    return result, chosen


def _power_picks(checkpoint: PolicyCheckpoint, drawn: Drawn, options: HeldOutOptions, power: float) -> list[int]:
    logprob_BT = sampled_logprobs(checkpoint.policy, drawn.rollouts, drawn.sampling, options.microbatch_tokens)
    logprob_PG = logprob_BT.double().sum(dim=1).numpy().reshape(-1, drawn.sampling.group_size)
    return [by_power(row_G, power, np.random.default_rng([options.seed, p])) for p, row_G in enumerate(logprob_PG)]


def _best_picks(
    records: Sequence[SampledResponse], size: int, choose: ChooseOptions, values: Sequence[FloatArray]
) -> list[int]:
    scores = [aggregate(values_T, choose.aggregate or "sum", choose.window) for values_T in values]
    return [
        by_score(scores[start : start + size], [record.finished for record in records[start : start + size]])
        for start in range(0, len(records), size)
    ]
