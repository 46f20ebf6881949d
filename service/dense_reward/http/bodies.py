"""Request bodies -> validated requests; answers and errors -> JSON responses."""

import asyncio
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

import orjson
from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dense_reward.errors import Fault, RequestError, refuse
from dense_reward.scoring.rows import Alternatives
from dense_reward.teacher.questions import list_fragment

Model = TypeVar("Model", bound=BaseModel)
MAX_FAULTS = 20
"""Maximum number of faults in a request's JSON that are reported one by one."""
INFLATED_BYTES = 65_536
"""Size of the parts in which a compressed body is inflated: other requests run between two of them."""
MAX_RATIO, RATIO_FREE_BYTES = 100, 1024 * 1024
"""Limit on what a byte of a compressed body becomes, once it has become more than `RATIO_FREE_BYTES`."""
MAX_NAME = 100
"""Maximum number of characters of a caller's name or type that an error repeats."""
MAX_MESSAGE = 4_000
"""Maximum number of characters of an error's message: a chat template can put a caller's whole text into its own."""


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits on a request body: size in bytes, before and after decompression, and seconds allowed for it to arrive."""

    max_bytes: int
    max_arrival_s: float


async def read_body(request: Request, limits: BodyLimits, hold: Callable[[int], None]) -> bytes:
    """The whole body, inflated if it was sent compressed.

    `hold(n)` reserves queue room for n bytes; this replaces its previous reservation. It can raise. It is called with
    Content-Length first, so that a full queue refuses early. That reservation is released again, and only received
    bytes are held: a caller that declares a large body and sends nothing takes no room from others. A compressed body
    is held as what it has been inflated to.

    Raises RequestError: unsupported_media_type, body_too_large, body_too_slow, invalid_encoding if a compressed body is
    not exactly one gzip stream, and what `hold` raises.
    """
    _check_type(request)
    try:
        async with asyncio.timeout(limits.max_arrival_s) as limit:
            return await _read(request, limits.max_bytes, hold)
    except TimeoutError:
        if not limit.expired():
            raise  # `hold` or the connection raised this, not our timeout
        message = (
            f"the body did not arrive within {limits.max_arrival_s:g} s (--max-arrival-s): send the items in parts"
        )
        raise refuse("body_too_slow", message) from None


def _check_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        named = content_type[:MAX_NAME] or "missing"
        raise refuse("unsupported_media_type", f"content type {named!r}: send application/json")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in {"identity", "gzip"}:
        message = f"content encoding {encoding[:MAX_NAME]!r}: send plain JSON, or gzip"
        raise refuse("unsupported_media_type", message)


async def _read(request: Request, max_bytes: int, hold: Callable[[int], None]) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit():
        if int(declared) > max_bytes:
            raise _too_large(max_bytes)
        hold(int(declared))  # refuses early if the queue is full
        hold(0)  # from now on only received bytes count
    inflater = _Inflater() if _is_compressed(request) else None
    parts: list[bytes] = []
    size = received = 0
    async for chunk in request.stream():
        received += len(chunk)
        for part in inflater.parts(chunk) if inflater else (chunk,):
            size += len(part)
            if size > max_bytes:
                raise _too_large(max_bytes)
            if size > max(RATIO_FREE_BYTES, MAX_RATIO * received):
                message = f"the body inflates to more than {MAX_RATIO} times its bytes: send it without compression"
                raise refuse("body_too_large", message)
            hold(size)
            parts.append(part)
            if inflater:
                await asyncio.sleep(0)
    if inflater:
        inflater.check_end()
    return b"".join(parts)


class _Inflater:
    """Inflates one gzip stream in parts of at most INFLATED_BYTES, because a small body can inflate to gigabytes."""

    def __init__(self) -> None:
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)

    def parts(self, chunk: bytes) -> Iterator[bytes]:
        """Raises RequestError(invalid_encoding)."""
        if chunk and self._inflater.eof:
            self.check_end(rest=chunk)
        is_full = False  # then there can be more of it inside zlib, although all of the chunk was taken
        while (chunk or is_full) and not self._inflater.eof:
            try:
                part = self._inflater.decompress(chunk, INFLATED_BYTES)
            except zlib.error:
                message = "the body is not gzip, contrary to its header Content-Encoding"
                raise refuse("invalid_encoding", message) from None
            chunk, is_full = self._inflater.unconsumed_tail, len(part) == INFLATED_BYTES
            yield part

    def check_end(self, rest: bytes = b"") -> None:
        if rest or not self._inflater.eof or self._inflater.unused_data:
            raise refuse("invalid_encoding", "the body is cut off, or bytes follow its gzip stream")


def _is_compressed(request: Request) -> bool:
    return request.headers.get("content-encoding", "identity").lower() == "gzip"


def parse(body: bytes, model: type[Model]) -> Model:
    """A validated request. Raises RequestError with the first MAX_FAULTS faults and the number of further ones.

    Holds the GIL: for a body of unknown size, `check_size` comes first.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise refuse("invalid_unicode", f"the body is not UTF-8: byte {error.start} is invalid") from None
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RequestError(_faults(error, model)) from None


def json_response(
    content: Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON response. A float32 becomes the shortest decimal number that gives the same float32 back."""
    return Response(_serialised(content), status, headers, media_type="application/json")


def fragment(content: Mapping[str, object]) -> orjson.Fragment:
    """A part of an answer, serialised by its own call.

    orjson holds the GIL during a call. If an answer is built by many short calls, the event loop can run between them.
    """
    return orjson.Fragment(_serialised(content))


def error_response(error: RequestError, request_id: str) -> Response:
    """The response of every error: code, message, param, items and request_id, with Retry-After if it is known."""
    first = error.faults[0]
    items = [fault_row(fault) for fault in error.faults if fault.item is not None]
    content = {
        "code": first.code,
        "message": _shown(first.message, MAX_MESSAGE),
        "param": first.param,
        "items": items or None,
        "request_id": request_id,
    }
    headers = {} if error.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    return json_response({"error": content}, error.status, headers)


def fault_row(fault: Fault) -> dict[str, object]:
    """One fault of an item, as it is listed in an error or an answer."""
    return {"item": fault.item, "code": fault.code, "message": _shown(fault.message, MAX_MESSAGE), "param": fault.param}


def _serialised(content: Mapping[str, object]) -> bytes:
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_PASSTHROUGH_DATACLASS
    return orjson.dumps(content, default=_in_parts, option=options)


def _in_parts(value: object) -> orjson.Fragment:
    if isinstance(value, Alternatives):
        return list_fragment(value, value.ids_SK.shape[1])
    raise TypeError(f"an answer has no JSON for {type(value)}")


def _faults(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    faults = [_fault(detail, model) for detail in details[:MAX_FAULTS]]
    if len(details) > MAX_FAULTS:
        message = f"{len(details) - MAX_FAULTS} more faults are not listed: correct these first"
        faults.append(Fault("invalid_request", message, item=_item_of(details[MAX_FAULTS])))
    return faults


def _fault(detail: ErrorDetails, model: type[BaseModel]) -> Fault:
    """pydantic's message with the place in the request. It does not repeat the value, which can be large or secret."""
    if detail["type"] == "json_invalid":
        code = "invalid_unicode" if "surrogate" in detail["msg"] or "hex escape" in detail["msg"] else "invalid_json"
        return Fault(code, detail["msg"])
    param = ".".join(_shown(str(part)) for part in detail["loc"]) or None
    where = f"{param}: " if param else ""
    return Fault("invalid_request", where + _message(detail, model), param, _item_of(detail))


def _message(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """pydantic's words, or plainer ones for the two faults that newcomers make."""
    key = str(detail["loc"][-1])[:MAX_NAME] if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        near = get_close_matches(key, () if "messages" in detail["loc"] else model.model_fields, n=1)
        return f"there is no such key: did you mean {near[0]}?" if near else "there is no such key: remove it"
    if detail["type"] == "string_type" and key == "prompt":
        return "must be a string; send a chat as messages, with the response as the last of them"
    return detail["msg"].removeprefix("Value error, ")


def _item_of(detail: ErrorDetails) -> int | None:
    match detail["loc"]:
        case ("items", int(index), *_):
            return index
    return None


def _shown(text: str, most: int = MAX_NAME) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _too_large(max_bytes: int) -> RequestError:
    message = f"the body is larger than {max_bytes} bytes (--max-body-bytes): send the items in parts"
    return refuse("body_too_large", message)


def body_schema(model: type[BaseModel]) -> dict[str, object]:
    """The schema of a request body for /docs. The routes read the body themselves, so FastAPI does not know it."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
