"""SGLang's route for log-probs of given ids: /generate.

Each position has a list [log-prob, id, null]. The list for the position `logprob_start_len` itself is [null, id, null]
or null: a client drops it. Log-probs are at the temperature of the request, which SGLang itself ignores.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Literal

import numpy as np
import orjson
from pydantic import Field, Strict, model_validator

from dense_reward.errors import refuse
from dense_reward.records import MAX_CANDIDATES, FloatArray, IdArray, TeacherScores
from dense_reward.schemas import Ids, IdsPerToken, Strictly
from dense_reward.scoring.scorer import Scorer
from dense_reward.teacher.options import (
    LikeliestIds,
    Nothing,
    NotStreamed,
    OneOrSeveral,
    WholeDistribution,
    listed,
    only,
)
from dense_reward.teacher.questions import (
    Answered,
    Question,
    TokenSequence,
    check_entries,
    checked_ids,
    fragment,
    list_fragment,
)
from dense_reward.text.encoded import as_ids

Listed = list[object]
"""One log-prob: [log-prob, id, null]."""


class SglangParameters(WholeDistribution):
    """The sampling_params of POST /generate."""

    max_new_tokens: Annotated[int, only(0, cure="a teacher writes nothing on this route")]
    no_stop_trim: bool = False
    stop: Nothing = None


class SglangRequest(Strictly):
    """The body of POST /generate, as far as it asks for the log-probs of given ids."""

    input_ids: OneOrSeveral
    sampling_params: SglangParameters
    return_logprob: Literal[True]
    logprob_start_len: Annotated[int, Strict(), Field(ge=0)] = Field(
        description="position from which on log-probs are wanted; the first of them is null"
    )
    top_logprobs_num: LikeliestIds = 0
    token_ids_logprob: Annotated[Ids, Field(max_length=MAX_CANDIDATES)] | None = Field(
        None, description="ids whose log-probs are wanted at each position"
    )
    token_ids_logprob_positions: IdsPerToken | None = Field(
        None, description="the same, with other ids for each position of one sequence"
    )
    return_text_in_logprobs: Annotated[bool | None, only(None, False, cure="log-probs have ids")] = None
    stream: NotStreamed = None
    text: Annotated[str | None, only(None, cure="send input_ids")] = None
    image_data: Nothing = None
    lora_path: Nothing = None
    rid: str | None = None

    @model_validator(mode="after")
    def _one_kind_of_ids(self) -> "SglangRequest":
        positions = self.token_ids_logprob_positions
        if positions is None:
            return self
        if self.token_ids_logprob is not None:
            raise ValueError("give token_ids_logprob or token_ids_logprob_positions, not both")
        if self.logprob_start_len or len(positions) != len(self.input_ids) or len(listed(self.input_ids)) > 1:
            raise ValueError(
                f"token_ids_logprob_positions needs one sequence, logprob_start_len 0, and a list for each of its "
                f"{len(self.input_ids)} ids; this has {len(positions)}"
            )
        return self

    def question(self, scorer: Scorer) -> Question:
        """Raises RequestError."""
        start, several = self.logprob_start_len + 1, checked_ids(listed(self.input_ids), scorer, "input_ids")
        shortest = min(map(len, several))
        if start > shortest:
            message = f"logprob_start_len {self.logprob_start_len} is not below {shortest}, the ids of a sequence"
            raise refuse("invalid_request", message, param="logprob_start_len")
        check_entries(sum(len(ids_L) - start for ids_L in several) * (1 + self.top_logprobs_num + self._requested_ids))
        sequences = tuple(TokenSequence(ids_L, start, self._candidates(ids_L, scorer)) for ids_L in several)
        return Question(sequences, self.sampling_params.divisor, self.top_logprobs_num)

    def answer(self, answered: Answered) -> bytes:
        """The JSON of the answer: an object, or a list of them for a list of sequences."""
        answers = [fragment(self._one(answered, *pair)) for pair in answered.pairs]
        return orjson.dumps(answers if isinstance(self.input_ids[0], list) else answers[0])

    def _candidates(self, ids_L: IdArray, scorer: Scorer) -> IdArray | None:
        """The ids that are wanted at each scored position, [S, K]; shorter rows are filled with the token itself."""
        own_S = ids_L[self.logprob_start_len + 1 :]
        vocab_size = scorer.limits.vocab_size
        if self.token_ids_logprob:
            ids_K = as_ids(self.token_ids_logprob, vocab_size, "token_ids_logprob")
            return np.tile(ids_K, (len(own_S), 1))
        rows, width = (self.token_ids_logprob_positions or [])[1:], self._requested_ids
        if width > MAX_CANDIDATES:
            message = f"token_ids_logprob_positions names {width} ids at a position; the limit is {MAX_CANDIDATES}"
            raise refuse("too_long", f"{message}: send fewer", param="token_ids_logprob_positions")
        if not width:
            return None
        flat = [
            token for row, own in zip(rows, own_S.tolist(), strict=True) for token in row + [own] * (width - len(row))
        ]
        return as_ids(flat, vocab_size, "token_ids_logprob_positions").reshape(len(rows), width)

    @property
    def _requested_ids(self) -> int:
        """The number of ids that are wanted at each scored position; that of the longest list if they differ."""
        positions = (self.token_ids_logprob_positions or [])[1:]
        return max(map(len, positions), default=len(self.token_ids_logprob or ()))

    def _one(self, answered: Answered, sequence: TokenSequence, scores: TeacherScores) -> dict[str, object]:
        ids_L = sequence.ids_L[sequence.start - 1 :].tolist()
        own = ([value, token, None] for value, token in zip(chain([None], scores.logprob_S), ids_L, strict=True))
        meta: dict[str, object] = {
            "id": self.rid or answered.request_id,
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(sequence.ids_L),
            "completion_tokens": 0,
            "cached_tokens": 0,
            "input_token_logprobs": list_fragment(own, 1),
            "output_token_logprobs": [],
        }
        if self.top_logprobs_num:
            rows = _rows(scores.top_logprob_SK, scores.top_ids_SK)
            meta["input_top_logprobs"] = list_fragment(rows, self.top_logprobs_num)
        if (requested := self._requested(sequence, scores)) is not None:
            meta["input_token_ids_logprobs"] = list_fragment(requested, 1 + self._requested_ids)
        return {"text": "", "output_ids": [], "meta_info": meta}

    def _requested(self, sequence: TokenSequence, scores: TeacherScores) -> Iterator[list[Listed] | None] | None:
        """The log-probs of the ids that were asked for; None if none were."""
        positions = self.token_ids_logprob_positions
        if sequence.candidates_SK is None or scores.candidate_logprob_SK is None:
            return None if positions is None else chain([None], ([] for _ in positions[1:]))
        rows = _rows(scores.candidate_logprob_SK, sequence.candidates_SK)
        if positions is None:
            return rows
        return (row and row[: len(ids)] for row, ids in zip(rows, positions, strict=True))


def _rows(logprob_SK: FloatArray, ids_SK: IdArray) -> Iterator[list[Listed] | None]:
    """One list for each position, None for the first. Ids with probability 0 are left out."""
    yield None
    for logprob_K, ids_K in zip(logprob_SK, ids_SK, strict=True):
        yield [[value, token, None] for value, token in zip(logprob_K, ids_K.tolist(), strict=True) if value != -np.inf]
