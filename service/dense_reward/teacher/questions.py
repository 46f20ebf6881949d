"""A request as a question to a teacher: its sequences, checked, as trunks; and the log-probs that answer it.

Shapes: L ids of a sequence, S scored ones, K likeliest or requested ids at each.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import orjson

from dense_reward.batching.admission import Permit
from dense_reward.batching.batcher import cost_tokens
from dense_reward.batching.scheduler import Terms
from dense_reward.errors import refuse
from dense_reward.records import Branch, IdArray, Scores, TaughtBy, Teacher, TeacherScores, Trunk, Wants
from dense_reward.scoring.items import Limits
from dense_reward.scoring.scorer import Scorer
from dense_reward.teacher.entries import PART_ENTRIES
from dense_reward.teacher.names import TeacherName
from dense_reward.text.encoded import as_ids

MAX_ENTRIES = 4_000_000
"""Limit on the log-probs in one answer: each is an object of its JSON."""
ENTRIES_PER_TOKEN = 32
"""Log-probs of an answer that take as much room in the queue as a token: they stay in memory until it is written."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Ids, of which those from `start` on are scored (at least 1), and the ids to score in place of each."""

    ids_L: IdArray
    start: int
    candidates_SK: IdArray | None = None

    @property
    def scored_tokens(self) -> int:
        return len(self.ids_L) - self.start

    @property
    def trunk(self) -> Trunk:
        scored_S = np.ones(self.scored_tokens, dtype=bool)
        return Trunk(self.ids_L[: self.start], (Branch(self.ids_L[self.start :], scored_S, self.candidates_SK),))


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks of a teacher. `temperature` is above 0."""

    sequences: tuple[TokenSequence, ...]
    temperature: float
    top_k: int

    @property
    def entries(self) -> int:
        """The number of log-probs in the answer."""
        return sum(
            sequence.scored_tokens * (1 + self.top_k)
            + (0 if sequence.candidates_SK is None else sequence.candidates_SK.size)
            for sequence in self.sequences
        )


@dataclass(frozen=True, slots=True)
class Taught:
    """The log-probs of each sequence of a question, in order, and the seconds of each stage."""

    scores: list[TeacherScores]
    timing_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Answered:
    """The sequences of a question with their log-probs, and what an answer names. `text` gives the text of a token."""

    model: str
    request_id: str
    pairs: list[tuple[TokenSequence, TeacherScores]]
    text: Callable[[int], str]


def fragment(content: object) -> orjson.Fragment:
    """A part of an answer, serialised by a call of its own: orjson holds the GIL during a call."""
    return orjson.Fragment(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))


def list_fragment(rows: Iterable[object], entries_per_row: int) -> orjson.Fragment:
    """A list, serialised part by part while its rows are made: all of them at once would take gigabytes."""
    remaining, size = iter(rows), max(1, PART_ENTRIES // entries_per_row)
    parts: list[bytes] = []
    while part := list(islice(remaining, size)):
        parts.append(orjson.dumps(part, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
    return orjson.Fragment(b"[%b]" % b",".join(parts))


def check_entries(entries: int) -> None:
    """Raises RequestError(too_long) for an answer with too many log-probs. Call it before arrays of that size exist."""
    if entries > MAX_ENTRIES:
        message = f"the answer would have {entries} log-probs; the limit is {MAX_ENTRIES}"
        raise refuse("too_long", f"{message}: ask for fewer ids at each token, or send the sequences in smaller chunks")


def checked_ids(sequences: Sequence[Sequence[int]], scorer: Scorer, param: str) -> list[IdArray]:
    """The ids of each sequence. Raises RequestError with the sequence, the limit and the cure."""
    if len(sequences) > scorer.max_items:
        message = f"{len(sequences)} sequences; the limit is {scorer.max_items} (--max-items)"
        raise refuse("too_long", f"{message}: send them in smaller chunks", param=param)
    return [_checked(ids, scorer.limits, f"{param}[{at}]") for at, ids in enumerate(sequences)]


def _checked(ids: Sequence[int], limits: Limits, param: str) -> IdArray:
    if not ids:
        raise refuse("empty_prompt", f"{param} has no ids: give at least one", param=param)
    if len(ids) > limits.max_length_tokens:
        message = f"{param} has {len(ids)} tokens; the limit is {limits.max_length_tokens}"
        raise refuse("too_long", f"{message}: shorten it, nothing is truncated here", param=param)
    return as_ids(ids, limits.vocab_size, param)


async def ask(scorer: Scorer, name: TeacherName, question: Question, permit: Permit, group: str | None) -> Taught:
    """The log-probs of each sequence. Raises RequestError, also for log-probs that JSON cannot carry."""
    check_entries(question.entries)
    engine = taught_by(scorer)(Teacher(name.tilt, question.temperature, question.top_k))
    trunks = [sequence.trunk for sequence in question.sequences]
    _hold(permit, cost_tokens(engine, trunks), question.entries)
    computed = await scorer.batcher.submit(engine, trunks, Wants(), Terms(group=group))
    scorer.metrics.stage("queue", computed.queue_s)
    scorer.metrics.stage("compute", computed.compute_s)
    found = await scorer.lanes.of(question.entries).run(_found, scorer, question, computed.scores)
    return Taught(found, {"queue_s": computed.queue_s, "compute_s": computed.compute_s})


def _found(scorer: Scorer, question: Question, scores: Scores) -> list[TeacherScores]:
    """Raises RequestError for log-probs that JSON cannot carry."""
    found = [each.teacher for of_trunk in scores for each in of_trunk if each.teacher is not None]
    for at, (sequence, each) in enumerate(zip(question.sequences, found, strict=True)):
        _check_numbers(scorer, sequence, each, at)
    return found


def _hold(permit: Permit, tokens: int, entries: int) -> None:
    """Hold queue room for the tokens and for the answer. An answer alone never makes a request too long."""
    permit.correct(tokens)
    permit.correct(min(tokens + entries // ENTRIES_PER_TOKEN, permit.admission.capacity_tokens))


def taught_by(scorer: Scorer) -> TaughtBy:
    """Raises RequestError(unsupported_by_engine) if the engine has no whole distributions."""
    if scorer.taught_by is not None:
        return scorer.taught_by
    name = scorer.card.name
    if scorer.card.token_head is not None:
        message = f"{name} is a token head, which has values and no distribution: distil from a pair"
    else:
        message = (
            f"another inference engine computes {name}, and its answers lack the whole distributions that a teacher "
            "needs: serve the pair with --engine torch, or, for the sft model alone, ask that engine's server itself"
        )
    raise refuse("unsupported_by_engine", message, param="model")


def _check_numbers(scorer: Scorer, sequence: TokenSequence, scores: TeacherScores, at: int) -> None:
    """JSON has neither NaN nor infinities. A likeliest id with probability 0 is no fault: the answer leaves it out."""
    asked = [scores.logprob_S[:, None]]
    if scores.candidate_logprob_SK is not None:
        asked.append(scores.candidate_logprob_SK)
    if any(np.isnan(array).any() or np.isposinf(array).any() for array in (*asked, scores.top_logprob_SK)):
        scorer.metrics.non_finite(scorer.card.name, 1)
        message = "a model gave a number that is not finite: serve the checkpoint with --dtype float32 or bfloat16"
        raise refuse("non_finite", f"sequence {at}: {message}")
    impossible_S = np.isneginf(np.concatenate(asked, axis=1)).any(axis=1)
    if impossible_S.any():
        position = sequence.start + int(impossible_S.argmax())
        message = f"sequence {at}, position {position}: an id that is asked for has probability 0 under this teacher"
        raise refuse("invalid_request", f"{message}, which has no log-prob in JSON: leave the sequence out")
