"""vLLM's routes for log-probs of given ids: /v1/completions and /inference/v1/generate.

Each position has an object of ids, the token itself first: {"ID": {"logprob": nats, "rank": 1 for the likeliest}}.
With `echo`, /v1/completions has OpenAI's arrays instead, which lm-evaluation-harness reads; each token is written as
token_id:ID, as vLLM does with return_tokens_as_token_ids, because several ids can have the same text.
The one token that `max_tokens` 1 asks for is the likeliest, at every temperature.
"""

import time
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Literal, Self

import numpy as np
import orjson
from pydantic import Field, model_validator

from dense_reward.records import TeacherScores
from dense_reward.schemas import Ids, Strictly
from dense_reward.scoring.scorer import Scorer
from dense_reward.teacher.entries import entries_json
from dense_reward.teacher.options import (
    ONE,
    LikeliestIds,
    Nothing,
    NotStreamed,
    OneAnswer,
    OneOrSeveral,
    WholeDistribution,
    listed,
    only,
)
from dense_reward.teacher.questions import Answered, Question, TokenSequence, checked_ids, fragment, list_fragment

MaxTokens = Annotated[int, only(0, 1, cure=ONE), Field(description="1: also the likeliest next token")]


class CompletionRequest(WholeDistribution):
    """The body of POST /v1/completions, as far as it asks for the log-probs of given ids."""

    model: str | None = Field(None, description="name of a teacher, as GET /v1/models lists them")
    prompt: OneOrSeveral
    max_tokens: MaxTokens
    prompt_logprobs: LikeliestIds | None = None
    echo: bool | None = Field(None, description="with logprobs, in place of prompt_logprobs: OpenAI's arrays")
    logprobs: LikeliestIds | None = None
    best_of: OneAnswer = None
    stream: NotStreamed = None
    suffix: Nothing = None
    stop: Nothing = None
    user: str | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _of_the_prompt_in_one_form(self) -> Self:
        """Log-probs of the prompt are asked for by `prompt_logprobs`, or by both `echo` and `logprobs`."""
        if (self.prompt_logprobs is None) != (bool(self.echo) and self.logprobs is not None) or (
            self.prompt_logprobs is not None and (self.echo or self.logprobs is not None)
        ):
            raise ValueError(
                "log-probs of the prompt are what a teacher answers: give prompt_logprobs, or echo true with logprobs"
            )
        return self

    def question(self, scorer: Scorer) -> Question:
        """Raises RequestError."""
        sequences = checked_ids(listed(self.prompt), scorer, "prompt")
        likeliest = self.logprobs if self.prompt_logprobs is None else self.prompt_logprobs
        return Question(tuple(TokenSequence(ids_L, 1) for ids_L in sequences), self.divisor, likeliest or 0)

    def answer(self, answered: Answered) -> bytes:
        """The JSON of the answer."""
        choices = [
            fragment(
                {
                    "index": at,
                    "text": answered.text(scores.next_id) if self.max_tokens else "",
                    "logprobs": echoed(sequence, scores, self.max_tokens) if self.echo else None,
                    "finish_reason": "length",
                    "stop_reason": None,
                    "token_ids": [scores.next_id][: self.max_tokens],
                    "prompt_logprobs": None if self.echo else prompt_logprobs(sequence, scores),
                }
            )
            for at, (sequence, scores) in enumerate(answered.pairs)
        ]
        content = {
            "id": answered.request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": answered.model,
            "choices": choices,
            "usage": _usage(answered, self.max_tokens),
        }
        return orjson.dumps(content)


class GenerateParameters(WholeDistribution):
    """The sampling_params of POST /inference/v1/generate."""

    max_tokens: MaxTokens
    prompt_logprobs: LikeliestIds
    logprobs: Annotated[int | None, only(None, cure="prompt_logprobs has the log-probs of the ids")] = None
    stop: Nothing = None


class GenerateRequest(Strictly):
    """The body of POST /inference/v1/generate, as far as it asks for the log-probs of given ids."""

    model: str | None = Field(None, description="name of a teacher, as GET /v1/models lists them")
    token_ids: Ids = Field(description="token ids of one sequence")
    sampling_params: GenerateParameters
    request_id: str | None = None
    stream: NotStreamed = None
    output_mode: Literal["tokens"] = "tokens"
    return_token_ids: bool | None = None
    features: Nothing = None
    cache_salt: str | None = None
    priority: int = 0

    def question(self, scorer: Scorer) -> Question:
        """Raises RequestError."""
        (ids_L,) = checked_ids([self.token_ids], scorer, "token_ids")
        parameters = self.sampling_params
        return Question((TokenSequence(ids_L, 1),), parameters.divisor, parameters.prompt_logprobs)

    def answer(self, answered: Answered) -> bytes:
        """The JSON of the answer, which has no text."""
        ((sequence, scores),) = answered.pairs
        generated = self.sampling_params.max_tokens
        choice = {
            "index": 0,
            "logprobs": None,
            "finish_reason": "length",
            "token_ids": [scores.next_id][:generated],
        }
        content = {
            "request_id": self.request_id or answered.request_id,
            "model": answered.model,
            "created": int(time.time()),
            "choices": [choice],
            "prompt_logprobs": prompt_logprobs(sequence, scores),
            "usage": _usage(answered, generated),
        }
        return orjson.dumps(content)


def prompt_logprobs(sequence: TokenSequence, scores: TeacherScores) -> orjson.Fragment:
    """vLLM's list: one entry for each id of the sequence, null for the first, before which there is nothing."""
    entries = chain([b"null"] * sequence.start, entries_json(sequence.ids_L[sequence.start :], scores))
    return orjson.Fragment(b"[%b]" % b",".join(entries))


def echoed(sequence: TokenSequence, scores: TeacherScores, generated: int) -> dict[str, object]:
    """OpenAI's arrays: an entry for each id of the sequence, null for the first, then one for the generated token.

    The log-prob of the generated token is null: it was not asked for. The likeliest ids of each position include the
    token itself, so that it is the likeliest one if it has the highest of these log-probs.
    """
    start, length = sequence.start, len(sequence.ids_L)
    ids = [*sequence.ids_L.tolist(), *[scores.next_id][:generated]]
    none, after = [None] * start, [None] * generated
    rows = chain(none, _likeliest(sequence, scores), after)
    return {
        "tokens": [_named(token) for token in ids],
        "token_logprobs": [*none, *scores.logprob_S[: length - start].tolist(), *after],
        "top_logprobs": list_fragment(rows, 1 + scores.top_ids_SK.shape[1]),
    }


def _likeliest(sequence: TokenSequence, scores: TeacherScores) -> Iterator[dict[str, float]]:
    for at, token in enumerate(sequence.ids_L[sequence.start :].tolist()):
        logprob_K = scores.top_logprob_SK[at]
        possible_K = logprob_K > -np.inf  # JSON has no infinity
        row = zip(scores.top_ids_SK[at][possible_K].tolist(), logprob_K[possible_K].tolist(), strict=True)
        yield {_named(other): logprob for other, logprob in row} | {_named(token): float(scores.logprob_S[at])}


def _named(token: int) -> str:
    return f"token_id:{token}"


def _usage(answered: Answered, generated: int) -> dict[str, int]:
    prompt = sum(len(sequence.ids_L) for sequence, _ in answered.pairs)
    completion = generated * len(answered.pairs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
