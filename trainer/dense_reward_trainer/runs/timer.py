"""Measures how long the parts of a step take."""

from time import perf_counter


class Timer:
    """Durations of named laps, in seconds; a lap starts where the previous one ended."""

    def __init__(self) -> None:
        self._started = self._last = perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends the current lap under this name."""
        now = perf_counter()
        self._laps[name], self._last = now - self._last, now

    def report(self, tokens: int) -> dict[str, float]:
        """The laps, and response tokens per second of the whole step."""
        return {**self._laps, "tokens_per_s": tokens / (self._last - self._started)}
