"""Every error that a client raises about the service.

All of them can be pickled, so that a worker process can pass them on.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ItemError:
    """The fault of one item. `param` names the field, `item` is the index of the item."""

    code: str
    message: str
    param: str | None = None
    item: int | None = None


class ClientError(Exception):
    """The base of all errors about the service. Wrong arguments raise TypeError or ValueError instead."""


class ScoringError(ClientError):
    """The service refused the request. `items` holds every bad item if there are several."""

    def __init__(  # noqa: PLR0917 - an exception is pickled by its positional arguments
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        items: tuple[ItemError, ...] = (),
        request_id: str | None = None,
    ) -> None:
        super().__init__(status, code, message, param, items, request_id)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.items = items
        self.request_id = request_id

    def __str__(self) -> str:
        request = f" [request {self.request_id}]" if self.request_id else ""
        others = f" ({len(self.items)} items are bad)" if len(self.items) > 1 else ""
        return f"{self.status} {self.code}: {self.message}{others}{request}"


class MismatchError(ScoringError):
    """409: the served tokenizer or revision is not the expected one."""


class ServiceUnavailableError(ClientError):
    """The service could not be reached, or was too busy, until the time for retries was over."""

    def __init__(self, last: str, attempts: int, waited_s: float) -> None:
        super().__init__(last, attempts, waited_s)
        self.last = last
        self.attempts = attempts
        self.waited_s = waited_s

    def __str__(self) -> str:
        if self.waited_s == 0:  # it was not retried
            return self.last
        return f"gave up after {self.attempts} attempts in {self.waited_s:.1f} s; the last one: {self.last}"


class AnswerError(ClientError):
    """The response is not an answer of this service."""


class AlignmentError(AnswerError):
    """The rewards in the answer do not belong to the tokens that were sent."""


class TokenizerMismatchError(ClientError):
    """The service has a different tokenizer, so the caller's ids mean different tokens there."""

    def __init__(self, own_sha256: str, served_sha256: str, model: str) -> None:
        super().__init__(own_sha256, served_sha256, model)
        self.own_sha256 = own_sha256
        self.served_sha256 = served_sha256
        self.model = model

    def __str__(self) -> str:
        return (
            f"your tokenizer has sha256 {self.own_sha256}, {self.model} was trained with {self.served_sha256}: "
            "train the policy with the reward model's tokenizer, or send text instead of ids"
        )
