"""Samples answers from a policy, judges them, and scores them under all references."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from dense_reward.records import IdArray, Report

from dense_reward_trainer.credit.error_localisation import messages_of
from dense_reward_trainer.credit.judged_answers import JudgedAnswers
from dense_reward_trainer.credit.references import References
from dense_reward_trainer.data.sources import Demonstration
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from dense_reward_trainer.rl.prompts import check_room_at_service
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.sampling import Sampling, counted, sample
from dense_reward_trainer.runs.kept_parts import KeptParts
from dense_reward_trainer.runs.progress import Progress

IsRight = Callable[[Demonstration, str], bool]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Sampled answers as they are kept: the ids of each, and whether it ended its turn."""

    responses: list[list[int]]
    finished: list[bool]

    def rollouts(self, prompts: Sequence[IdArray]) -> list[Rollout]:
        """The answers beside their prompts; `prompts` can be longer."""
        return [
            Rollout(prompt_P, np.array(ids, dtype=np.int32), finished)
            for prompt_P, ids, finished in zip(prompts, self.responses, self.finished, strict=False)
        ]


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
    is_right: IsRight,
    parts: KeptParts | None = None,
) -> JudgedAnswers:
    """Sample `samples` answers, spread over the prompts of the demonstrations, and score each under all references.

    `is_right` judges answers that end their turn; an answer that was cut off is wrong. `window`: see `aggregate`. If
    all are right, or all wrong, this is reported and none is scored. `parts` keeps the samples, and their scores.
    Raises ConfigError if a prompt leaves no room; JobError if the service cannot score.
    """
    references.check_tokenizer(checkpoint.manifest.tokenizer_sha256)
    each = -(-samples // len(demonstrations))
    chosen = demonstrations[: -(-samples // each)]
    prompts = [checkpoint.encoder.chat_prompt(messages_of(one)[:-1]) for one in chosen]
    longest = min(pair.card.max_length_tokens for pair in references.pairs)
    check_room_at_service(longest, prompts, sampling.max_new_tokens)
    parts = KeptParts(None, report) if parts is None else parts
    report(f"{samples} sampled answers to {len(chosen)} prompts")

    def draw() -> Drawn:
        with Progress(len(prompts) * each, "sampled answers") as progress:
            own = replace(sampling, group_size=each)
            rollouts = sample(checkpoint.policy, prompts, own, seed, counted(progress))[:samples]
        return Drawn([one.response_T.tolist() for one in rollouts], [one.finished for one in rollouts])

    rollouts = parts.get("samples", Drawn, draw).rollouts([prompt for prompt in prompts for _ in range(each)])
    texts = [_text(checkpoint, rollout) for rollout in rollouts]
    rights = [
        rollout.finished and is_right(chosen[index // each], text)
        for index, (rollout, text) in enumerate(zip(rollouts, texts, strict=True))
    ]
    unscored = JudgedAnswers(rights, [index // each for index in range(len(rollouts))], {})
    if unscored.not_ranked is not None:
        report(unscored.not_ranked)
        return unscored

    def score() -> JudgedAnswers:
        judged = JudgedAnswers.of_columns(references.columns)
        progress = Progress(len(rollouts), "scored answers")
        answers = progress.each(references.score_rollouts(rollouts), lambda answer: answer.scored.length)
        for index, (right, answer) in enumerate(zip(rights, answers, strict=True)):
            judged.add(answer, right=right, prompt=index // each, window=window)
        return judged

    return parts.get("scored_samples", JudgedAnswers, score)


def _text(checkpoint: PolicyCheckpoint, rollout: Rollout) -> str:
    body_T = rollout.response_T[:-1] if rollout.finished else rollout.response_T
    return checkpoint.encoder.tokenizer.text_and_spans([int(i) for i in body_T])[0]
