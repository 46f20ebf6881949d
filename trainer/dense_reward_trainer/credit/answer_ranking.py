"""Ranks right above wrong answers by every signal and aggregate. Answers are sampled from a policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from dense_reward.records import Report
from tqdm import tqdm

from dense_reward_trainer.configs.signals import Aggregate
from dense_reward_trainer.credit.aggregates import aggregate
from dense_reward_trainer.credit.auroc import Interval, auroc_interval
from dense_reward_trainer.credit.calibration import Calibration, calibration
from dense_reward_trainer.credit.error_localisation import messages_of
from dense_reward_trainer.credit.references import References
from dense_reward_trainer.data.sources import Demonstration, final_answer
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from dense_reward_trainer.rl.prompts import check_room_at_service
from dense_reward_trainer.rl.sampling import Sampling, sample

IsRight = Callable[[Demonstration, str], bool]
AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)


@dataclass(frozen=True, slots=True)
class Ranking:
    """How one aggregate of one signal ranks: AUROC of right against wrong answers, and calibration of P(right | it).

    `calibration` is null if there are too few answers of either kind to fit and judge it.
    """

    auroc: Interval
    calibration: Calibration | None


@dataclass(frozen=True, slots=True)
class JudgedAnswers:
    """For each answer: whether it is right, its prompt's index, and its score by column and aggregate."""

    right: list[bool]
    prompt: list[int]
    scores: dict[str, dict[Aggregate, list[float]]]

    @property
    def counts(self) -> tuple[int, int]:
        """Number of right answers, and of wrong ones."""
        return sum(self.right), len(self.right) - sum(self.right)

    def ranking(self, seed: int) -> dict[str, dict[Aggregate, Ranking]]:
        """The ranking by each column and aggregate. Raises ConfigError if right or wrong answers are missing."""
        right, wrong = self.counts
        if not right or not wrong:
            raise ConfigError(
                f"{right} samples are right and {wrong} are wrong, but ranking compares the two: raise samples, give "
                "another policy, or set policy=null to measure only planted errors"
            )
        return {
            column: {name: self._ranking(found, seed) for name, found in scores.items()}
            for column, scores in self.scores.items()
        }

    def _ranking(self, scores: list[float], seed: int) -> Ranking:
        return Ranking(
            auroc_interval(scores, self.right, self.prompt, seed), calibration(scores, self.right, self.prompt, seed)
        )


def has_its_answer(demonstration: Demonstration, text: str) -> bool:
    """Whether a sampled text states the final answer of the demonstration."""
    return final_answer(text) == demonstration.answer


def rank(
    references: References,
    checkpoint: PolicyCheckpoint,
    demonstrations: Sequence[Demonstration],
    sampling: Sampling,
    *,
    samples: int,
    window: int,
    seed: int,
    report: Report,
    is_right: IsRight = has_its_answer,
) -> JudgedAnswers:
    """Sample `samples` answers, spread over the prompts whose answer is known, and score each under all references.

    `is_right` judges answers that end their turn; an answer that was cut off is wrong. `window`: see `aggregate`.
    Raises ConfigError if no answer is known or a prompt leaves no room; JobError if the service cannot score.
    """
    known = [demonstration for demonstration in demonstrations if demonstration.answer is not None]
    if not known:
        raise ConfigError("no demonstration states its final answer, so samples cannot be judged right or wrong")
    references.check_tokenizer(checkpoint.manifest.tokenizer_sha256)
    each = -(-samples // len(known))
    chosen = known[: -(-samples // each)]
    prompts = [checkpoint.encoder.chat_prompt(messages_of(one)[:-1]) for one in chosen]
    longest = min(pair.card.max_length_tokens for pair in references.pairs)
    check_room_at_service(longest, prompts, sampling.max_new_tokens)
    report(f"sampling {samples} answers to {len(chosen)} prompts")
    rollouts = sample(checkpoint.policy, prompts, replace(sampling, group_size=each), seed)[:samples]
    judged = JudgedAnswers([], [], {column: {name: [] for name in AGGREGATES} for column in references.columns})
    answers = tqdm(references.score_rollouts(rollouts), total=len(rollouts), desc="sampled answers", unit="answer")
    for index, (rollout, answer) in enumerate(zip(rollouts, answers, strict=True)):
        body_T = rollout.response_T[:-1] if rollout.finished else rollout.response_T
        text = checkpoint.encoder.tokenizer.text_and_spans([int(i) for i in body_T])[0]
        judged.right.append(rollout.finished and is_right(chosen[index // each], text))
        judged.prompt.append(index // each)
        for column, values_T in answer.signals.items():
            for name in AGGREGATES:
                judged.scores[column][name].append(aggregate(values_T, name, window))
    return judged
