"""Every refusal and failure that a caller can get, and the table from error code to HTTP status. Imports no library."""

from collections.abc import Sequence
from dataclasses import dataclass

STATUS_BY_CODE = {
    "invalid_json": 400,
    "invalid_unicode": 400,
    "invalid_encoding": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "body_too_slow": 408,
    "in_use": 409,
    "loading": 409,
    "tokenizer_mismatch": 409,
    "revision_mismatch": 409,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "invalid_request": 422,
    "empty_prompt": 422,
    "too_long": 422,
    "unknown_token_id": 422,
    "wrong_shape": 422,
    "bad_template": 422,
    "undecided_template": 422,
    "repeated_text": 422,
    "unsupported_by_engine": 422,
    "load_failed": 422,
    "queue_full": 429,
    "rate_limited": 429,
    "non_finite": 500,
    "internal": 500,
    "out_of_memory": 503,
    "engine_unavailable": 503,
    "starting": 503,
    "draining": 503,
    "deadline_exceeded": 504,
}

RETRY_UNAVAILABLE_S = 2.0
"""Retry-After of a service that starts, stops or cannot reach its models. A guess: the real time is unknown."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a request. `param` names the field, `item` is the index of the item at fault."""

    code: str
    message: str
    param: str | None = None
    item: int | None = None

    def __post_init__(self) -> None:
        if self.code not in STATUS_BY_CODE:
            raise KeyError(f"error code {self.code!r} has no status: add it to STATUS_BY_CODE")


class RequestError(Exception):
    """A request that cannot be answered. Carries every fault that was found; its code is that of the first."""

    def __init__(self, faults: Sequence[Fault], *, retry_after_s: float | None = None) -> None:
        self.faults = tuple(faults)
        self.retry_after_s = retry_after_s
        super().__init__("; ".join(fault.message for fault in self.faults))

    @property
    def code(self) -> str:
        return self.faults[0].code

    @property
    def status(self) -> int:
        return STATUS_BY_CODE[self.code]


def refuse(
    code: str, message: str, *, param: str | None = None, item: int | None = None, retry_after_s: float | None = None
) -> RequestError:
    """A RequestError with one fault. Returns the error and does not raise it: write `raise refuse(...)`."""
    return RequestError([Fault(code, message, param, item)], retry_after_s=retry_after_s)


def engine_unavailable() -> RequestError:
    """The refusal while the servers of another engine do not answer. The log has the reason: it names their hosts."""
    message = "the servers that compute this pair do not answer: try again later (the log of the service says why)"
    return refuse("engine_unavailable", message, retry_after_s=RETRY_UNAVAILABLE_S)


class CheckpointError(Exception):
    """A checkpoint or a pair that cannot be served. The message gives the reason and the cure."""


class LoadingStoppedError(Exception):
    """Loading a pair was cancelled, because the service stops."""


class OutOfMemoryError(Exception):
    """The device could not hold a batch. A batch of fewer tokens can fit."""


class SequenceError(Exception):
    """The engine cannot score a sequence of a batch, even if it tries again. It can score the others."""


class EngineLostError(Exception):
    """The device cannot compute any more in this process. Only a new process helps."""


class SettingsError(Exception):
    """An invalid setting. The message names its flag and, if the value is at fault, its environment variable."""


class BulkError(Exception):
    """Bulk scoring cannot go on. What was written stays; the message gives the reason and the cure."""
