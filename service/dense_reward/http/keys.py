"""Who may ask: the keys of a file, read again when it changes, and what each of them may do. Knows no HTTP."""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, SecretStr, TypeAdapter, field_validator

from dense_reward.errors import SettingsError, refuse
from dense_reward.schemas import Strictly
from dense_reward.settings import read_list

log = logging.getLogger("dense_reward")
Right = Literal["score", "admin"]
MIN_KEY_CHARACTERS = 16
"""Shorter keys can be guessed."""


class KeyEntry(Strictly):
    """One entry of the file. `key` is what its holder sends; the name is for logs, and may change hands."""

    model_config = ConfigDict(hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    key: Annotated[SecretStr, Field(min_length=MIN_KEY_CHARACTERS)]
    rights: Annotated[frozenset[Right], Field(min_length=1)] = frozenset({"score"})
    max_concurrent: Annotated[int, Field(gt=0)] | None = None
    requests_per_minute: Annotated[int, Field(gt=0)] | None = None

    @field_validator("key")
    @classmethod
    def _travels(cls, key: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
            raise ValueError("a key is of ASCII letters, digits and signs: others do not travel in a header")
        return key


ENTRIES = TypeAdapter(Annotated[list[KeyEntry], Field(min_length=1)])


@dataclass(slots=True)
class Use:
    """What a key's holder does now; outlives a change of the file. `allowance` is None before the first request."""

    inside: int = 0
    allowance: float | None = None
    counted_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a key. Knows the key's digest alone."""

    name: str
    digest: bytes
    rights: frozenset[Right]
    max_concurrent: int | None
    requests_per_minute: int | None
    use: Use = field(default_factory=Use)

    @contextmanager
    def admitted(self, now_s: float) -> Iterator[None]:
        """One request more, for as long as the block lasts. Raises RequestError(rate_limited) beyond the limits."""
        if self.max_concurrent is not None and self.use.inside >= self.max_concurrent:
            message = f"key {self.name} may have {self.max_concurrent} requests at once (max_concurrent of its entry)"
            raise refuse("rate_limited", f"{message}: wait for the others", retry_after_s=1.0)
        self._count(now_s)
        self.use.inside += 1
        try:
            yield
        finally:
            self.use.inside -= 1

    def _count(self, now_s: float) -> None:
        """A bucket of one minute's requests that fills up all the time: a burst may take what others left."""
        limit = self.requests_per_minute
        if limit is None:
            return
        use = self.use
        before = limit if use.allowance is None else use.allowance
        use.allowance = min(limit, before + (now_s - use.counted_at_s) * limit / 60)
        use.counted_at_s = now_s
        if use.allowance < 1:
            message = f"key {self.name} may ask {limit} times a minute (requests_per_minute of its entry)"
            raise refuse("rate_limited", message, retry_after_s=(1 - use.allowance) * 60 / limit)
        use.allowance -= 1


class Keys:
    """The keys of a file. A changed file counts from the next request on; one that cannot be read changes nothing."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises SettingsError where the file cannot be read now."""
        self._file = file
        self._clock = clock
        self._seen = self._version()
        self._callers = self._read()

    def caller(self, key: str) -> Caller | None:
        """The holder of a key, compared in a time that tells nothing about it."""
        self._refresh()
        digest = _digest(key)
        found = None
        for caller in self._callers:
            if hmac.compare_digest(caller.digest, digest):
                found = caller
        return found

    @property
    def now_s(self) -> float:
        return self._clock()

    def _refresh(self) -> None:
        version = self._version()
        if version == self._seen:
            return
        self._seen = version
        try:
            self._callers = self._read()
        except SettingsError as error:
            log.error("%s; the keys of before still count", error)
        else:
            log.info("keys read again: %s", ", ".join(caller.name for caller in self._callers))

    def _version(self) -> tuple[int, int, int] | None:
        """Changes with the file, also where it is a link that is pointed elsewhere, as in a mounted secret."""
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    def _read(self) -> list[Caller]:
        entries = read_list("--api-keys-file", self._file, ENTRIES)
        before = {caller.name: caller.use for caller in getattr(self, "_callers", ())}
        callers = [_caller(entry, before.get(entry.name) or Use()) for entry in entries]
        if len({caller.digest for caller in callers}) < len(callers):
            raise SettingsError(f"--api-keys-file {self._file}: two entries have the same key")
        return callers


def _caller(entry: KeyEntry, use: Use) -> Caller:
    digest = _digest(entry.key.get_secret_value())
    return Caller(entry.name, digest, entry.rights, entry.max_concurrent, entry.requests_per_minute, use)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
