"""Admission control: permits for the tokens of all requests inside the service. Knows no queue and no device."""

from dataclasses import dataclass, field

from dense_reward.batching.worker_threads import LARGE_TOKENS
from dense_reward.errors import refuse

SMALL_SHARE = 16
"""Small requests are admitted to a full queue while they hold less than one part in so many of it."""


@dataclass(slots=True)
class Permit:
    """The right to hold `tokens` of the queue's capacity. A context manager: leaving it releases them."""

    admission: "Admission"
    tokens: int

    def __enter__(self) -> "Permit":
        return self

    def __exit__(self, *_: object) -> None:
        self._hold(0)

    def estimate(self, tokens: int) -> None:
        """Hold about `tokens` for a body that is still being read, instead of what was held for it before.

        Raises RequestError(queue_full) if there is no room for its first token; for that of a large body also if other
        large ones have filled the queue meanwhile, because several can grow at a time.
        """
        admission = self.admission
        if tokens > LARGE_TOKENS:
            admission.check(is_large=True, own_tokens=self.tokens)
        elif tokens and not self.tokens:
            admission.check()
        self._hold(min(tokens, admission.capacity_tokens))

    def correct(self, tokens: int) -> None:
        """Replace the estimate by the count. Raises RequestError: queue_full, or too_long if the count can never fit.

        A request that holds at least one token was admitted: a too low estimate is no reason to refuse it.
        """
        admission = self.admission
        if tokens > admission.capacity_tokens:
            message = (
                f"the request has {tokens} tokens, the queue holds {admission.capacity_tokens} (--max-queue-tokens)"
            )
            raise refuse("too_long", f"{message}: send it in parts")
        if tokens and not self.tokens:
            admission.check()
        self._hold(tokens)

    def _hold(self, tokens: int) -> None:
        self.admission.held_tokens += tokens - self.tokens
        self.admission.large_tokens += tokens * (tokens > LARGE_TOKENS) - self.tokens * (self.tokens > LARGE_TOKENS)
        self.tokens = tokens


@dataclass(slots=True)
class Admission:
    """Counts the tokens of all admitted requests, and measures the tokens per second of the device.

    A request of any size is admitted while one token is free; otherwise small requests would starve large ones.
    The queue can therefore exceed its capacity by one request, and by the share of small requests beside large ones.
    `large_tokens`: what large requests hold of `held_tokens`.
    """

    capacity_tokens: int
    rate_tokens_per_s: float = 0.0
    held_tokens: int = field(default=0)
    large_tokens: int = field(default=0)

    def permit(self, tokens: int) -> Permit:
        """Admit a request of about `tokens`. Raises RequestError(queue_full) with the seconds until there is room."""
        self.check()
        permit = Permit(self, 0)
        permit.estimate(tokens)
        return permit

    def check(self, *, is_large: bool = False, own_tokens: int = 0) -> None:
        """Raises RequestError(queue_full) if no token is free. Large requests leave a share to small ones.

        `own_tokens`: what a large request holds already. Then only other large ones keep it out.
        """
        small_tokens = self.held_tokens - self.large_tokens
        held_tokens = self.large_tokens if own_tokens > LARGE_TOKENS else self.held_tokens
        over = held_tokens - own_tokens - self.capacity_tokens
        if over < 0 or (not is_large and small_tokens < self.capacity_tokens // SMALL_SHARE):
            return
        retry_after_s = (over + 1) / self.rate_tokens_per_s if self.rate_tokens_per_s else 1.0
        message = f"the queue holds {self.capacity_tokens} tokens (--max-queue-tokens) and is full: try again later"
        raise refuse("queue_full", message, retry_after_s=max(1.0, retry_after_s))

    def check_wait(self, seconds: float, *, is_large: bool = False) -> None:
        """Raises RequestError(queue_full) if the admitted requests take longer than `seconds` at the measured rate.

        A small request does not wait for large ones: batches take from all requests in turn.
        """
        tokens = self.held_tokens if is_large else self.held_tokens - self.large_tokens
        wait_s = tokens / self.rate_tokens_per_s if self.rate_tokens_per_s else 0.0
        if wait_s > seconds:
            message = f"the queue is {wait_s:.1f} s long, and an answer is wanted within {seconds:g} s: try again later"
            raise refuse("queue_full", message, retry_after_s=max(1.0, wait_s - seconds))

    def measured(self, tokens: int, seconds: float) -> None:
        """Record that a batch of `tokens` took `seconds`. A batch without tokens is ignored: it measures nothing."""
        if not tokens:
            return
        rate = tokens / max(seconds, 1e-6)
        self.rate_tokens_per_s = rate if not self.rate_tokens_per_s else 0.8 * self.rate_tokens_per_s + 0.2 * rate
