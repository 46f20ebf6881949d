"""Work on a thread that ends once its request has: long loops ask between two steps. Imports nothing."""

from contextvars import ContextVar


class CancelledWorkError(Exception):
    """The request whose work this is has ended: its deadline passed, or its caller disconnected."""


class Cancellation:
    """Set on the event loop, read on the thread of the work."""

    is_set = False


CANCELLATION: ContextVar[Cancellation | None] = ContextVar("cancellation", default=None)


def check_cancelled() -> None:
    """Raises CancelledWorkError if this work's request has ended. A thread cannot be stopped from outside."""
    cancellation = CANCELLATION.get()
    if cancellation is not None and cancellation.is_set:
        raise CancelledWorkError
