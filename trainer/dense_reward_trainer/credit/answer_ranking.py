"""Ranks right above wrong answers by a signal, summed over the answer. Answers are sampled from a policy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from dense_reward import ScoredResponse
from dense_reward.records import Report
from tqdm import tqdm

from dense_reward_trainer.credit.auroc import Interval, auroc_interval
from dense_reward_trainer.credit.calibration import Calibration, calibration
from dense_reward_trainer.credit.error_localisation import SIGNALS, messages_of, signal_of
from dense_reward_trainer.data.sources import Demonstration, final_answer
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from dense_reward_trainer.rl.prompts import check_room_at_service
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.reward_service import PinnedPair, requests
from dense_reward_trainer.rl.sampling import Sampling, sample

IsRight = Callable[[Demonstration, str], bool]


@dataclass(frozen=True, slots=True)
class Ranking:
    """How one signal ranks: AUROC of right against wrong answers, and the calibration of P(right | sum).

    `calibration` is null if there are too few answers of either kind to fit and judge it.
    """

    auroc: Interval
    calibration: Calibration | None


@dataclass(frozen=True, slots=True)
class AnswerSums:
    """For each sampled answer: whether it is right, its prompt's index, and the sum of each signal over it, in nats."""

    right: list[bool]
    prompt: list[int]
    nats: dict[str, list[float]]

    @property
    def counts(self) -> tuple[int, int]:
        """Number of right answers, and of wrong ones."""
        return sum(self.right), len(self.right) - sum(self.right)

    def ranking(self, seed: int) -> dict[str, Ranking]:
        """The ranking by each signal. Raises ConfigError if right or wrong answers are missing."""
        right, wrong = self.counts
        if not right or not wrong:
            raise ConfigError(
                f"{right} samples are right and {wrong} are wrong, but ranking compares the two: raise samples, give "
                "another policy, or set policy=null to measure only planted errors"
            )
        return {
            name: Ranking(
                auroc_interval(self.nats[name], self.right, self.prompt, seed),
                calibration(self.nats[name], self.right, self.prompt, seed),
            )
            for name in SIGNALS
        }


def has_its_answer(demonstration: Demonstration, text: str) -> bool:
    """Whether a sampled text states the final answer of the demonstration."""
    return final_answer(text) == demonstration.answer


def rank(
    pair: PinnedPair,
    checkpoint: PolicyCheckpoint,
    demonstrations: Sequence[Demonstration],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    report: Report,
    is_right: IsRight = has_its_answer,
) -> AnswerSums:
    """Sample `samples` answers, spread over the prompts whose answer is known, and sum the pair's signals over each.

    `is_right` judges answers that end their turn; an answer that was cut off is wrong. Raises ConfigError if no answer
    is known or a prompt leaves no room; JobError if the service cannot score the samples.
    """
    known = [demonstration for demonstration in demonstrations if demonstration.answer is not None]
    if not known:
        raise ConfigError("no demonstration states its final answer, so samples cannot be judged right or wrong")
    pair.check_tokenizer(checkpoint.manifest.tokenizer_sha256)
    each = -(-samples // len(known))
    chosen = known[: -(-samples // each)]
    prompts = [checkpoint.encoder.chat_prompt(messages_of(one)[:-1]) for one in chosen]
    check_room_at_service(pair.card.max_length_tokens, prompts, sampling.max_new_tokens)
    report(f"sampling {samples} answers to {len(chosen)} prompts")
    rollouts = sample(checkpoint.policy, prompts, replace(sampling, group_size=each), seed)[:samples]
    sums = AnswerSums([], [], {name: [] for name in SIGNALS})
    for index, (rollout, scored) in enumerate(zip(rollouts, _scored(pair, rollouts), strict=True)):
        body_T = rollout.response_T[:-1] if rollout.finished else rollout.response_T
        text = checkpoint.encoder.tokenizer.text_and_spans([int(i) for i in body_T])[0]
        sums.right.append(rollout.finished and is_right(chosen[index // each], text))
        sums.prompt.append(index // each)
        for name in SIGNALS:
            sums.nats[name].append(float(signal_of(scored, name).sum(dtype=np.float64)))
    return sums


def _scored(pair: PinnedPair, rollouts: Sequence[Rollout]) -> Iterator[ScoredResponse]:
    with tqdm(total=len(rollouts), desc="sampled answers", unit="answer") as bar:
        for items in requests(rollouts, pair.request_tokens):
            results = pair.score(items, SIGNALS).results
            bar.update(len(results))
            yield from results
