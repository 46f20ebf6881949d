"""Builds a client's requests: the bytes, which every attempt sends again, and what the answer must hold. Pure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dense_reward.client.responses import WIRE_DTYPES, Expectation, Expected, SentIds
from dense_reward.schemas import ArrayName, SignalName

Encoding = Literal["base64", "float"]
OnError = Literal["fail", "per_item"]
HeatmapFormat = Literal["html", "svg", "ansi", "json"]
Ids = Sequence[int] | NDArray[np.integer]
ItemToScore = Mapping[str, object]
# What ids.py accepts: lists, arrays, tensors and the output of a tokenizer, also several of them.
AnyIds = Ids | Sequence[Ids] | Mapping[str, object] | Iterable[object]
# If ids were sent, the service can omit strings, and the offsets in them.
REQUIRABLE = WIRE_DTYPES.keys() - {"offsets"}


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """The options of a request, with the defaults of the service. `include` names the arrays of the answer.

    If ids are sent, the answer always includes token_ids: alignment is verified with them.
    """

    render: Literal["chat", "raw"] | None = None
    add_eos: bool | None = None
    model: str | None = None
    signal: SignalName = "reward"
    gamma: float = 1.0
    top_k: int = 0
    priority: Literal["interactive", "bulk"] = "interactive"
    tokenizer_sha256: str | None = None
    expect_revision: str | None = None
    include: Sequence[ArrayName] | None = None

    def given(self) -> dict[str, object]:
        """The options that differ from the defaults, named by JSON key."""
        chosen = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: value for name, value in chosen.items() if value != getattr(DEFAULTS, name)}


DEFAULTS = ScoreOptions()


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request."""

    method: Literal["GET", "POST"]
    path: str
    body: bytes | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.body is None else {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class ScoreCall:
    """A request for rewards, and what its answer must hold."""

    call: Call
    expectation: Expectation


MODELS = Call("GET", "/models")
READY = Call("GET", "/ready")


def one_item(**parts: object) -> dict[str, object]:
    """An item with the parts that are not None."""
    return {name: part for name, part in parts.items() if part is not None}


def score_one(item: ItemToScore, options: ScoreOptions, encoding: Encoding) -> ScoreCall:
    """A request with a single item. Raises TypeError for ids that are not integers, ValueError for a wrong shape."""
    return _score_call(item, [item], options, encoding, may_fail=False)


def score_many(items: Sequence[ItemToScore], options: ScoreOptions, encoding: Encoding, on_error: OnError) -> ScoreCall:
    """A request with a batch of items. Raises like `score_one`."""
    body = {"items": list(items), "on_error": on_error}
    return _score_call(body, items, options, encoding, may_fail=on_error == "per_item")


def heatmap(
    items: Sequence[ItemToScore], options: ScoreOptions, format_: HeatmapFormat, palette: str | None, compare: bool
) -> Call:
    body = {"items": list(items), "format": format_, "compare": compare} | one_item(palette=palette)
    return Call("POST", "/heatmap", json_bytes(body | options.given()))


def _score_call(
    body: ItemToScore, items: Sequence[ItemToScore], options: ScoreOptions, encoding: Encoding, *, may_fail: bool
) -> ScoreCall:
    expected = tuple(response for index, item in enumerate(items) for response in expected_of(index, item))
    given = options.given()
    required = frozenset({"reward"} if options.include is None else options.include)
    if any(response.ids_T is not None for response in expected):
        required |= {"token_ids"}
        if options.include is not None:
            given["include"] = list(dict.fromkeys([*options.include, "token_ids"]))
    call = Call("POST", "/score", json_bytes({**body, **given, "encoding_format": encoding}))
    model = (options.model, options.expect_revision, options.tokenizer_sha256)
    return ScoreCall(call, Expectation(expected, required & REQUIRABLE, may_fail, *model))


def expected_of(index: int, item: ItemToScore) -> list[Expected]:
    """What the client knows of an item's responses before they are scored.

    Raises TypeError or ValueError if ids are not integers or have the wrong depth. The service checks everything else.
    """
    sent = _sent_ids(item)
    candidates = _widths(item.get("candidate_ids"), len(sent))
    segments = _counts(item.get("segments"), len(sent))
    return [
        Expected(index, g, ids_T, width, count)
        for g, (ids_T, width, count) in enumerate(zip(sent, candidates, segments, strict=True))
    ]


def id_array(value: object, name: str, dimensions: int = 1) -> SentIds:
    """Ids as int64. Raises TypeError if they are not integers, ValueError for a wrong number of dimensions."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths") from None
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers; it holds {array.dtype}")
    no_rows = dimensions == 2 and array.shape == (0,)
    if array.ndim != dimensions and not no_rows:
        raise ValueError(f"{name} must have {dimensions} dimension(s); it has {array.ndim}")
    return array.astype(np.int64)


def json_bytes(body: Mapping[str, object]) -> bytes:
    """A body as JSON bytes, with arrays and tensors as lists.

    Raises ValueError for NaN, infinity and lone surrogates, TypeError for a value that JSON cannot represent.
    """
    try:
        text = json.dumps(body, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_integers)
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text holds a lone surrogate, which is not a Unicode character: {error}: remove it") from None
    except ValueError as error:
        raise ValueError(f"JSON has no NaN and no infinity: {error}: remove them from the request") from None


def _integers(value: object) -> list[int] | int:
    array = np.asarray(value)
    if array.dtype.kind == "b":
        array = array.astype(np.int8)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{type(value).__name__} of {array.dtype} cannot be sent: arrays in a request must be integers")
    integers: list[int] | int = array.tolist()
    return integers


def _sent_ids(item: ItemToScore) -> list[SentIds | None]:
    """The ids to score, one entry per response; None if the service makes them from text."""
    if "response_ids" in item:
        rows = _rows(item["response_ids"], "response_ids")
        return [id_array(ids, f"response_ids[{g}]") for g, ids in enumerate(rows)]
    if "token_ids" in item and "score_mask" in item:
        ids = id_array(item["token_ids"], "token_ids")
        mask = np.asarray(item["score_mask"])
        if mask.shape != ids.shape:
            raise ValueError(f"{len(ids)} token_ids, but a score_mask of shape {list(mask.shape)}")
        return [ids[mask == 1]]
    if "responses" in item:
        return [None] * len(_rows(item["responses"], "responses"))
    return [None]


def _widths(candidate_ids: object, responses: int) -> list[int | None]:
    """The number of candidates K of each response; None without candidates."""
    if candidate_ids is None:
        return [None] * responses
    rows = _rows(candidate_ids, "candidate_ids", responses)
    arrays = [id_array(ids, f"candidate_ids[{g}]", 2) for g, ids in enumerate(rows)]
    return [array.shape[1] if array.ndim == 2 else 0 for array in arrays]


def _counts(segments: object, responses: int) -> list[int | None]:
    """The number of segments S of each response; None without segments."""
    if segments is None:
        return [None] * responses
    return [len(_rows(spans, f"segments[{g}]")) for g, spans in enumerate(_rows(segments, "segments", responses))]


def _rows(value: object, name: str, count: int | None = None) -> list[object]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list with one entry per response; it is a {type(value).__name__}")
    rows = list(value)
    if count is not None and len(rows) != count:
        raise ValueError(f"{name} has {len(rows)} entries for {count} responses")
    return rows
