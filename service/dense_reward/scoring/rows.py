"""Scores -> the rows of an answer: the arrays, summaries and text that a request includes. Pure."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from dense_reward import reward
from dense_reward.errors import refuse
from dense_reward.records import FloatArray, IdArray, TokenScores, Wants
from dense_reward.schemas import ScoreRequest
from dense_reward.scoring.items import PreparedItem
from dense_reward.text.encoded import EncodedResponse
from dense_reward.text.offsets import Span
from dense_reward.text.tokenizer import Tokenizer

Alternative = dict[str, int | float | str]
"""id, token (its text), sft_logprob and reward, by the keys of their JSON."""


@dataclass(frozen=True, slots=True)
class Alternatives(Sequence[list[Alternative]]):
    """For each token the likeliest ids under the SFT model. Those of a token are made when they are taken.

    As dicts all alternatives of a large answer are 260,000 objects, which the garbage collector visits again and again
    while every other thread waits.
    """

    ids_SK: IdArray
    sft_logprob_SK: FloatArray
    reward_SK: FloatArray
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.ids_SK)

    @overload
    def __getitem__(self, index: int) -> list[Alternative]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Alternative]]: ...

    def __getitem__(self, index: int | slice) -> list[Alternative] | list[list[Alternative]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids = self.ids_SK[index].tolist()
        columns = (ids, self.tokenizer.pieces(ids), self.sft_logprob_SK[index].tolist(), self.reward_SK[index].tolist())
        return [
            {"id": i, "token": token, "sft_logprob": logprob, "reward": value}
            for i, token, logprob, value in zip(*columns, strict=True)
        ]


Value = FloatArray | IdArray | list[str] | Alternatives | str | float | None
Row = dict[str, Value | int]
"""One response in an answer, by the keys of its JSON."""


def wants(request: ScoreRequest) -> Wants:
    """What the engine must compute for this request."""
    included = set(request.include or ())
    return Wants(
        kl=bool({"kl", "centred"} & included) or request.signal == "centred",
        entropy="entropy" in included,
        varentropy="varentropy" in included,
        top_k=request.top_k,
    )


def included_arrays(request: ScoreRequest, *, from_text: bool) -> frozenset[str]:
    """The arrays of an answer: those in `include`.

    Without `include`: ids, reward and signal, and also tokens and offsets if text was sent.
    """
    if request.include is not None:
        return frozenset(request.include)
    arrays = {"token_ids", "reward", request.signal}
    return frozenset(arrays | {"tokens", "offsets"} if from_text else arrays)


@dataclass(frozen=True, slots=True)
class RowBuilder:
    """Builds the rows of one request's answer."""

    request: ScoreRequest
    tokenizer: Tokenizer

    def rows(self, index: int, item: PreparedItem, scores: Sequence[TokenScores]) -> list[Row]:
        """One row per response. Raises RequestError(non_finite) if a score is NaN or infinite."""
        arrays = included_arrays(self.request, from_text=item.from_text)
        return [
            {"item": index, "response": g}
            | self._row(response, score, arrays, None if item.segments is None else item.segments[g])
            for g, (response, score) in enumerate(zip(item.responses, scores, strict=True))
        ]

    def _row(
        self,
        response: EncodedResponse,
        score: TokenScores,
        arrays: frozenset[str],
        segments: Sequence[Span] | None,
    ) -> Row:
        _check_finite(score)
        values_S = reward.signal(self.request.signal, score)
        summary = reward.summarise(values_S)
        ids_S = response.ids_T[response.scored_T]
        per_token = self._arrays(score, values_S, ids_S, arrays)
        row: Row = {name: self._transport(array) for name, array in per_token.items()}
        row |= self._text(response, ids_S, arrays)
        if (rewards_SK := reward.candidate_reward(score)) is not None:
            row["candidate_reward"] = self._transport(rewards_SK)
        if score.candidate_sft_logprob_SK is not None and "candidate_sft_logprob" in arrays:
            row["candidate_sft_logprob"] = self._transport(score.candidate_sft_logprob_SK)
        if segments is not None:
            row["segments"] = self._transport(reward.segment_sums(values_S, segments))
        rewards_SK = reward.alternative_reward(score)
        if score.top_ids_SK is not None and score.top_sft_logprob_SK is not None and rewards_SK is not None:
            row["alternatives"] = Alternatives(score.top_ids_SK, score.top_sft_logprob_SK, rewards_SK, self.tokenizer)
        return row | {"sum": summary.sum, "mean": summary.mean, "min": summary.min, "length": len(ids_S)}

    def _arrays(
        self, score: TokenScores, values_S: FloatArray, ids_S: IdArray, arrays: frozenset[str]
    ) -> dict[str, FloatArray | IdArray]:
        computed: dict[str, FloatArray | IdArray | None] = {
            "token_ids": ids_S,
            "reward": reward.reward(score),
            "sft_logprob": None if score.value_S is not None else score.sft_logprob_S,
            "reference_logprob": None if score.value_S is not None else score.reference_logprob_S,
            "kl": score.kl_S,
            "entropy": score.entropy_S,
            "varentropy": score.varentropy_S,
        }
        if "centred" in arrays:
            computed["centred"] = reward.centred(score)
        if "return_to_go" in arrays:
            computed["return_to_go"] = reward.return_to_go(values_S, self.request.gamma)
        included = {name: array for name, array in computed.items() if name in arrays}
        present = {name: array for name, array in included.items() if array is not None}
        if len(present) < len(included):
            missing = sorted(included.keys() - present.keys())
            raise ValueError(f"the engine did not compute {missing}: request them in wants()")
        return present

    def _text(self, response: EncodedResponse, ids_S: IdArray, arrays: frozenset[str]) -> Row:
        row: Row = {}
        if not arrays & {"tokens", "offsets", "text"}:
            return row
        text, spans = response.text, response.spans_S
        if text is None or spans is None:
            text, spans = self.tokenizer.text_and_spans(ids_S.tolist())
        if "tokens" in arrays:
            row["tokens"] = self.tokenizer.pieces(ids_S.tolist())
        if "offsets" in arrays:
            row["offsets"] = self._transport(np.array(spans, dtype=np.int32).reshape(-1, 2))
        if "text" in arrays:
            row["text"] = text
        return row

    def _transport(self, array: FloatArray | IdArray) -> Value:
        if self.request.encoding_format == "float":
            # orjson serialises only contiguous arrays.
            return array if array.flags.c_contiguous else array.copy()
        return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _check_finite(score: TokenScores) -> None:
    arrays = (
        score.sft_logprob_S,
        score.reference_logprob_S,
        score.kl_S,
        score.entropy_S,
        score.varentropy_S,
        score.candidate_sft_logprob_SK,
        score.candidate_reference_logprob_SK,
        score.top_sft_logprob_SK,
        score.top_reference_logprob_SK,
        score.value_S,
    )
    if not reward.all_finite(arrays):
        message = "a model gave a number that is not finite: serve the checkpoint with --dtype float32 or bfloat16"
        raise refuse("non_finite", message)
