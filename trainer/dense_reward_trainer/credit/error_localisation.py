"""Does a signal point at an error? Errors are planted in right answers; the wrong token should have the lowest signal.

The answer with the error has as many tokens as the right one, so that they differ only in the error.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dense_reward import ScoredResponse
from dense_reward.records import FloatArray

from dense_reward_trainer.credit.auroc import Interval, auroc, mean_interval
from dense_reward_trainer.credit.example import Example, ShownAnswer
from dense_reward_trainer.credit.judged_answers import JudgedAnswers
from dense_reward_trainer.credit.references import Answer, References, pair_of
from dense_reward_trainer.data.corruption import DIGITS, NEEDED, Corrupter, Corruption
from dense_reward_trainer.data.sources import Demonstration
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.rl.reward_service import Chat
from dense_reward_trainer.runs.progress import Progress

Against = Literal["tokens", "digit_tokens"]
ANSWERS_TOGETHER, MAX_TRIES = 64, 8


@dataclass(frozen=True, slots=True)
class PlantedError:
    """A right answer, and the same answer with one error."""

    demonstration: Demonstration
    corruption: Corruption


@dataclass(frozen=True, slots=True)
class Localisation:
    """How one signal finds errors, as means over answers.

    `auroc`: P(error < another token). `hit`: share of answers in which the error is the lowest token.
    """

    auroc: Interval
    hit: Interval


@dataclass(frozen=True, slots=True, eq=False)
class ErrorScores:
    """A signal in one answer: its value at the error, and at the tokens that the error is compared with."""

    error: float
    others: FloatArray

    @property
    def auroc(self) -> float:
        """P(error < other) + P(equal) / 2."""
        return auroc([-self.error], -self.others)

    @property
    def hit(self) -> float:
        """1 if the error is the lowest; 1/n if n tokens, the error among them, share the lowest value; else 0."""
        lowest = float(self.others.min())
        return float(self.error < lowest) if self.error != lowest else 1 / (1 + int((self.others == lowest).sum()))


def localise(
    references: References,
    demonstrations: Sequence[Demonstration],
    corrupter: Corrupter,
    *,
    count: int,
    against: Against,
    window: int,
    seed: int,
) -> tuple[dict[str, Localisation], JudgedAnswers, Example]:
    """How each column finds errors in the first `count` answers that can hold an error of the corrupter's kind.

    Also returns these answers without their error (right) and with it (wrong), and the first of them as an example;
    `window`: see `aggregate`. Raises ConfigError if there are fewer, or if an error has no token to be compared with.
    """
    scores: dict[str, list[ErrorScores]] = {column: [] for column in references.columns}
    judged = JudgedAnswers.of_columns(references.columns)
    example: Example | None = None
    with Progress(count, f"answers with a planted error ({corrupter.kind})") as progress:
        for index, (planted, right, wrong) in enumerate(planted_errors(references, demonstrations, corrupter, seed)):
            error, others = error_and_others(planted, offsets_of(wrong.scored), against)
            if not others:
                raise ConfigError(f"{planted.demonstration.source}: no other token has a digit: set against=tokens")
            for column, values_T in wrong.signals.items():
                scores[column].append(ErrorScores(float(values_T[error]), values_T[others]))
            judged.add(right, right=True, prompt=index, window=window)
            judged.add(wrong, right=False, prompt=index, window=window)
            example = example or example_of(planted, right, wrong, error)
            progress.advance(tokens=right.scored.length + wrong.scored.length)
            if index + 1 == count:
                break
    found = judged.counts[0]
    if found < count or example is None:
        cure = f"set answers to at most {found}" if found else f"leave {corrupter.kind} out of corruptions"
        raise ConfigError(
            f"only {found} answers can hold an error of kind {corrupter.kind}, but answers is {count}: {cure}. Such an "
            f"answer has {NEEDED[corrupter.kind]}, and keeps its number of tokens"
        )
    return summarise(scores, seed), judged, example


def example_of(planted: PlantedError, right: Answer, wrong: Answer, error: int) -> Example:
    """The answers with their rewards under each reference, for the picture."""
    shown = [
        ShownAnswer(
            text,
            offsets_of(answer.scored),
            {column: values_T for column, values_T in answer.signals.items() if pair_of(column) is not None},
        )
        for text, answer in ((planted.demonstration.response, right), (planted.corruption.text, wrong))
    ]
    return Example(shown[0], shown[1], error)


def summarise(scores: Mapping[str, Sequence[ErrorScores]], seed: int) -> dict[str, Localisation]:
    """Means over the errors, by column."""
    return {
        name: Localisation(
            mean_interval([one.auroc for one in errors], seed), mean_interval([one.hit for one in errors], seed)
        )
        for name, errors in scores.items()
    }


def planted_errors(
    references: References, demonstrations: Sequence[Demonstration], corrupter: Corrupter, seed: int
) -> Iterator[tuple[PlantedError, Answer, Answer]]:
    """Answers with an error, and their scores without it and with it, in the order of the demonstrations.

    Each answer gets the first of up to MAX_TRIES seeded errors that keeps its number of tokens, or is left out.
    """
    for start in range(0, len(demonstrations), ANSWERS_TOGETHER):
        part = demonstrations[start : start + ANSWERS_TOGETHER]
        proposed = {i: proposals(corrupter, one, [seed, start + i]) for i, one in enumerate(part)}
        right = [*references.score_chats([_chat(one, one.response) for one in part], ["offsets"])]
        found: dict[int, tuple[PlantedError, Answer, Answer]] = {}
        for attempt in range(MAX_TRIES):
            tried = {i: some[attempt] for i, some in proposed.items() if i not in found and attempt < len(some)}
            if not tried:
                continue
            chats = [_chat(part[i], corruption.text) for i, corruption in tried.items()]
            answers = references.score_chats(chats, ["offsets", "token_ids"])
            for (i, corruption), answer in zip(tried.items(), answers, strict=True):
                if answer.scored.length == right[i].scored.length:
                    found[i] = PlantedError(part[i], corruption), right[i], answer
        yield from (found[i] for i in sorted(found))


def proposals(corrupter: Corrupter, demonstration: Demonstration, seed: Sequence[int]) -> list[Corruption]:
    """Up to MAX_TRIES different errors for one answer; the same seed gives the same errors."""
    rng = random.Random(str(list(seed)))
    drawn = (corrupter(demonstration.response, rng) for _ in range(MAX_TRIES))
    return list(dict.fromkeys(corruption for corruption in drawn if corruption is not None))


def error_and_others(
    planted: PlantedError, offsets: Sequence[tuple[int, int]], against: Against
) -> tuple[int, list[int]]:
    """The index of the first wrong token, and the indices of the tokens that it is compared with.

    If an error has several tokens, all except its first are in neither group.
    """
    text, right = planted.corruption.text, planted.demonstration.response
    span = range(planted.corruption.start, planted.corruption.end)
    wrong = [t for t, (start, end) in enumerate(offsets) if any(text[i] != right[i] for i in range(start, end))]
    touched = {t for t, (start, end) in enumerate(offsets) if start < span.stop and end > span.start}
    others = [t for t in range(len(offsets)) if t not in touched]
    if against == "digit_tokens":
        others = [t for t in others if any(c in DIGITS for c in text[offsets[t][0] : offsets[t][1]])]
    return wrong[0], others


def offsets_of(scored: ScoredResponse) -> list[tuple[int, int]]:
    """Code-point spans of the tokens. Raises JobError if the service returned none."""
    if scored.offsets is None:
        raise JobError("the service returned no offsets")
    return [(int(start), int(end)) for start, end in scored.offsets]


def messages_of(demonstration: Demonstration) -> list[dict[str, str]]:
    """Role and content of each message. Raises ConfigError if the demonstration has more, which would be lost."""
    plain = all(message.as_mapping().keys() == {"role", "content"} for message in demonstration.messages)
    if demonstration.tools or not plain:
        raise ConfigError(f"{demonstration.source}: tools, their calls and reasoning are not measured: remove the row")
    return [{"role": message.role, "content": message.content} for message in demonstration.messages]


def _chat(demonstration: Demonstration, response: str) -> Chat:
    return [*messages_of(demonstration)[:-1], {"role": "assistant", "content": response}]
