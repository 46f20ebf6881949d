"""Parses the bytes of an answer of /score and checks them against what was sent: misaligned rewards raise.

Pure: knows no HTTP. Shapes: T scored tokens of a response, K candidates, S segments, G responses.
"""

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, JsonValue, ValidationError

from dense_reward.client.errors import AlignmentError, AnswerError, ItemError
from dense_reward.client.results import Scored, ServedModel, Timing, Usage
from dense_reward.client.scored_response import Alternative, ScoredResponse
from dense_reward.records import FloatArray, IdArray
from dense_reward.schemas import WIRE_VERSION, ModelCard

SentIds = NDArray[np.int64]
# All arrays that are sent as base64 if encoding_format is "base64": row-major, little-endian.
WIRE_DTYPES: Mapping[str, str] = {
    "token_ids": "<i4",
    "offsets": "<i4",
    "reward": "<f4",
    "sft_logprob": "<f4",
    "reference_logprob": "<f4",
    "kl": "<f4",
    "centred": "<f4",
    "entropy": "<f4",
    "varentropy": "<f4",
    "return_to_go": "<f4",
    "segments": "<f4",
    "candidate_reward": "<f4",
    "candidate_sft_logprob": "<f4",
}
CANDIDATE_SFT = "candidate_sft_logprob"
TOLERANCE = 1e-6
MOST_LOGPROB = 1e-3
"""Rounding can lift the log-prob of a certain token this far above 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What the client knows of a response before it is scored. None: only the service knows it, or it was not sent."""

    item: int
    response: int
    ids_T: SentIds | None = None
    candidates: int | None = None
    segments: int | None = None


@dataclass(frozen=True, slots=True)
class Expectation:
    """What an answer must hold: these responses in this order, each with the `required` arrays."""

    responses: tuple[Expected, ...]
    required: frozenset[str]
    may_fail: bool = False
    name: str | None = None
    revision: str | None = None
    tokenizer_sha256: str | None = None


class _WireResult(BaseModel):
    model_config = ConfigDict(frozen=True)

    item: int
    response: int | None = None
    length: int | None = None
    sum: FiniteFloat | None = None
    mean: FiniteFloat | None = None
    min: FiniteFloat | None = None
    token_ids: str | list[int] | None = None
    tokens: tuple[str, ...] | None = None
    offsets: str | list[tuple[int, int]] | None = None
    text: str | None = None
    reward: str | list[float] | None = None
    sft_logprob: str | list[float] | None = None
    reference_logprob: str | list[float] | None = None
    kl: str | list[float] | None = None
    centred: str | list[float] | None = None
    entropy: str | list[float] | None = None
    varentropy: str | list[float] | None = None
    return_to_go: str | list[float] | None = None
    candidate_reward: str | list[list[float]] | None = None
    candidate_sft_logprob: str | list[list[float]] | None = None
    segments: str | list[float] | None = None
    alternatives: tuple[tuple[Alternative, ...], ...] | None = None
    error: ItemError | None = None


class _WireAnswer(BaseModel):
    """Keys that a newer service adds are ignored. Services before 0.2 send no version; their format is 1.0."""

    model_config = ConfigDict(frozen=True)

    wire_version: str = "1.0"
    id: str
    model: ServedModel
    results: list[_WireResult]
    usage: Usage
    timing: Timing


def parse_scored(body: bytes, expectation: Expectation) -> Scored:
    """The results of an answer, in either encoding.

    Raises AlignmentError if they do not belong to the tokens that were sent, AnswerError if the body is not an answer,
    lacks a requested array, or holds a number that is not finite.
    """
    try:
        answer = _WireAnswer.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AnswerError(
            f"this is not an answer of a dense-reward service: {where}: {first['msg']} (it starts {body[:80]!r})"
        ) from None
    check_version(answer.wire_version)
    for name in ("name", "revision", "tokenizer_sha256"):
        wanted, served = getattr(expectation, name), getattr(answer.model, name)
        if wanted is not None and served != wanted:
            raise AnswerError(f"{name} {wanted} was requested, but the answer is of {served}: it must not be used")
    failed = [_failed(row) for row in answer.results if row.error is not None]
    if failed and not expectation.may_fail:
        raise AnswerError(f"item {failed[0].item} failed ({failed[0].error}) in a request whose items must all succeed")
    rows = [row for row in answer.results if row.error is None]
    expected = _still_expected(rows, failed, expectation.responses)
    scored = [_scored(row, wanted, expectation.required) for row, wanted in zip(rows, expected, strict=True)]
    if answer.model.token_head is None:
        for result in scored:
            _check_signs(result)
            _check_reward(result)
    results = sorted([*scored, *failed], key=lambda result: result.item)
    return Scored(answer.id, answer.model, tuple(results), answer.usage, answer.timing)


def check_version(version: str) -> None:
    """Raises AnswerError, with the cure, for a major version that this client does not know."""
    if version.split(".", maxsplit=1)[0] != WIRE_VERSION.split(".")[0]:
        raise AnswerError(
            f"the service answers in format {version}, this client reads {WIRE_VERSION}: install the same version of "
            "dense-reward on both sides"
        )


def parse_cards(body: bytes) -> tuple[ModelCard, ...]:
    """Parses an answer of /models. Raises AnswerError for anything else. Ignores keys that a newer service adds."""
    try:
        cards = _Cards.model_validate_json(body).models
        known = [{key: value for key, value in card.items() if key in ModelCard.model_fields} for card in cards]
        return tuple(ModelCard.model_validate(card) for card in known)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise AnswerError(
            f"this is not a list of models ({first['msg']}): check base_url; it starts {body[:80]!r}"
        ) from None


class _Cards(BaseModel):
    models: list[dict[str, JsonValue]]


def _failed(row: _WireResult) -> ScoredResponse:
    return ScoredResponse(row.item, None, 0, math.nan, error=row.error)


def _still_expected(
    rows: Sequence[_WireResult], failed: Sequence[ScoredResponse], responses: Sequence[Expected]
) -> list[Expected]:
    """The expected responses of the items that did not fail. Raises AlignmentError unless `rows` match in order."""
    failed_items = {result.item for result in failed}
    expected = [response for response in responses if response.item not in failed_items]
    wanted = [(response.item, response.response) for response in expected]
    received = [(row.item, row.response) for row in rows]
    unknown = failed_items - {response.item for response in responses}
    if received != wanted or unknown:
        raise AlignmentError(
            f"requested {len(responses)} responses and received {len(received)} with {len(failed_items)} failed items, "
            "or the same ones in a different order (results are item by item, response by response)"
        )
    return expected


def _scored(row: _WireResult, expected: Expected, required: frozenset[str]) -> ScoredResponse:
    where = f"item {expected.item}, response {expected.response}"
    length = row.length
    if length is None or row.sum is None:
        raise AnswerError(f"{where}: the answer has no length or no sum")
    if expected.ids_T is not None and length != len(expected.ids_T):
        raise AlignmentError(f"{where}: {len(expected.ids_T)} tokens were sent to score, but {length} were returned")
    arrays = _Arrays(row, where, length, expected)
    result = ScoredResponse(
        item=expected.item,
        response=expected.response,
        length=length,
        sum=row.sum,
        mean=row.mean,
        min=row.min,
        token_ids=arrays.ids("token_ids", length),
        tokens=row.tokens,
        offsets=arrays.ids("offsets", length, 2),
        text=row.text,
        reward=arrays.floats("reward", length),
        sft_logprob=arrays.floats("sft_logprob", length),
        reference_logprob=arrays.floats("reference_logprob", length),
        kl=arrays.floats("kl", length),
        centred=arrays.floats("centred", length),
        entropy=arrays.floats("entropy", length),
        varentropy=arrays.floats("varentropy", length),
        return_to_go=arrays.floats("return_to_go", length),
        candidate_reward=arrays.candidates("candidate_reward"),
        candidate_sft_logprob=arrays.candidates(CANDIDATE_SFT) if CANDIDATE_SFT in required else None,
        segments=arrays.segments(),
        alternatives=row.alternatives,
    )
    _check(result, expected, required, where)
    return result


@dataclass(frozen=True, slots=True, eq=False)
class _Arrays:
    """Decodes the arrays of one result, from base64 or lists, into the shapes that they must have."""

    row: _WireResult
    where: str
    length: int
    expected: Expected

    def ids(self, name: str, *shape: int) -> IdArray | None:
        array = self._array(name, shape)
        return None if array is None else array.astype(np.int32)

    def floats(self, name: str, *shape: int) -> FloatArray | None:
        array = self._array(name, shape)
        if array is None:
            return None
        if not np.isfinite(array).all():
            raise AnswerError(f"{self.where}: {name} holds a number that is not finite")
        return array.astype(np.float32)

    def candidates(self, name: str) -> FloatArray | None:
        """[T, K] if candidates were sent. If they were empty, the answer has no such key, and the array is empty."""
        width = self.expected.candidates
        if width is None:
            return None
        if self.length == 0 or width == 0:
            return np.zeros((self.length, width), dtype=np.float32)
        return self._required(name, self.length, width)

    def segments(self) -> FloatArray | None:
        """[S] if segments were sent."""
        count = self.expected.segments
        return None if count is None else self._required("segments", count)

    def _required(self, name: str, *shape: int) -> FloatArray:
        array = self.floats(name, *shape)
        if array is None:
            raise AnswerError(f"{self.where}: {name} was requested but is not in the answer")
        return array

    def _array(self, name: str, shape: tuple[int, ...]) -> NDArray[np.int32 | np.float32] | None:
        value: str | list[float] | None = getattr(self.row, name)
        if value is None:
            return None
        try:
            array = _decoded(value, WIRE_DTYPES[name])
        except (ValueError, OverflowError) as error:
            raise AnswerError(f"{self.where}: {name} cannot be read: {error}") from None
        if array.shape not in ((math.prod(shape),), shape):
            raise AlignmentError(f"{self.where}: {name} has shape {list(array.shape)}, it must be {list(shape)}")
        return array.reshape(shape)


def _decoded(value: str | list[float], dtype: str) -> NDArray[np.int32 | np.float32]:
    """Raises ValueError or OverflowError if the value is not an array of this type."""
    if isinstance(value, str):
        try:
            return np.frombuffer(base64.b64decode(value, validate=True), dtype=dtype)
        except binascii.Error as error:
            raise ValueError(f"not base64 ({error})") from None
    with np.errstate(over="ignore"):
        return np.array(value, dtype=dtype)


def _check_signs(result: ScoredResponse) -> None:
    """No log-prob is above 0, within rounding."""
    for name in ("sft_logprob", "reference_logprob"):
        values_T = getattr(result, name)
        if values_T is not None and (values_T > MOST_LOGPROB).any():
            raise AnswerError(
                f"item {result.item}, response {result.response}: {name} is {values_T.max()}, which no log-prob is: "
                "something between client and service changed the answer"
            )


def _check_reward(result: ScoredResponse) -> None:
    """The reward of a pair is the difference of its log-probs, within the rounding of float32."""
    reward, sft, reference = result.reward, result.sft_logprob, result.reference_logprob
    if reward is None or sft is None or reference is None:
        return
    tolerance = TOLERANCE * (1.0 + np.abs(sft) + np.abs(reference))
    wrong = np.flatnonzero(np.abs(reward - (sft - reference)) > tolerance)
    if len(wrong):
        at = int(wrong[0])
        raise AnswerError(
            f"item {result.item}, response {result.response}: the reward of token {at} is {reward[at]}, but "
            f"sft_logprob - reference_logprob is {sft[at] - reference[at]}: something between client and service "
            "changed the answer, or they differ in version"
        )


def _check(result: ScoredResponse, expected: Expected, required: frozenset[str], where: str) -> None:
    for name in sorted(required - {CANDIDATE_SFT}):
        if getattr(result, name) is None:
            raise AnswerError(f"{where}: {name} was requested but is not in the answer")
    for name, listed in (("tokens", result.tokens), ("alternatives", result.alternatives)):
        if listed is not None and len(listed) != result.length:
            raise AlignmentError(f"{where}: {len(listed)} {name} for {result.length} scored tokens")
    if expected.ids_T is None or result.token_ids is None:
        return
    different = np.flatnonzero(result.token_ids != expected.ids_T)
    if len(different):
        at = int(different[0])
        raise AlignmentError(
            f"{where}: token {at} was sent as {expected.ids_T[at]}, but its reward is for {result.token_ids[at]}"
        )
