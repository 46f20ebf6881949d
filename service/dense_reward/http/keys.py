"""The keys of a file, which is read again when it changes: the rights and the rate limits of each key."""

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

from pydantic import ConfigDict, Field, SecretStr, Strict, TypeAdapter, field_validator

from dense_reward.errors import SettingsError, refuse
from dense_reward.schemas import Strictly
from dense_reward.settings import read_list

log = logging.getLogger("dense_reward")
Right = Literal["score", "admin"]
MIN_KEY_CHARACTERS = 16
"""A shorter key can be guessed."""


class KeyEntry(Strictly):
    """One entry of the file. A caller sends `key`; logs and errors show `name`.

    Limits are counted by name, so a key can be replaced under its name without a reset.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    key: SecretStr
    rights: Annotated[frozenset[Right], Field(min_length=1)] = frozenset({"score"})
    max_concurrent: Annotated[int, Strict(), Field(gt=0)] | None = None
    requests_per_minute: Annotated[int, Strict(), Field(gt=0)] | None = None

    @field_validator("key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr) -> SecretStr:
        characters = len(key.get_secret_value())
        if characters < MIN_KEY_CHARACTERS:  # not Field(min_length=...), whose error calls characters items
            raise ValueError(f"a key must have at least {MIN_KEY_CHARACTERS} characters, not {characters}")
        if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
            raise ValueError("a key must be ASCII letters, digits and signs: a header cannot carry other characters")
        return key


ENTRIES = TypeAdapter(Annotated[list[KeyEntry], Field(min_length=1)])


@dataclass(slots=True)
class Use:
    """The requests of a key: those in flight, and those that its rate limit still allows.

    It survives a change of the file. `allowance` is None before the first request.
    """

    in_flight: int = 0
    allowance: float | None = None
    counted_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a key. Stores the digest of the key, not the key."""

    name: str
    digest: bytes
    rights: frozenset[Right]
    max_concurrent: int | None
    requests_per_minute: int | None
    use: Use = field(default_factory=Use)

    @contextmanager
    def admitted(self, now_s: float) -> Iterator[None]:
        """Count a request as in flight while the block runs. Raises RequestError(rate_limited) above a limit."""
        if self.max_concurrent is not None and self.use.in_flight >= self.max_concurrent:
            message = f"key {self.name} has {self.max_concurrent} requests in flight, its limit (max_concurrent)"
            raise refuse("rate_limited", f"{message}: wait for their answers", retry_after_s=1.0)
        self._count(now_s)
        self.use.in_flight += 1
        try:
            yield
        finally:
            self.use.in_flight -= 1

    def _count(self, now_s: float) -> None:
        """Token bucket: it holds one minute's requests and refills steadily, so a burst can use unused ones."""
        limit = self.requests_per_minute
        if limit is None:
            return
        use = self.use
        before = limit if use.allowance is None else use.allowance
        use.allowance = min(limit, before + (now_s - use.counted_at_s) * limit / 60)
        use.counted_at_s = now_s
        if use.allowance < 1:
            message = f"key {self.name} is limited to {limit} requests per minute (requests_per_minute)"
            raise refuse("rate_limited", f"{message}: try later", retry_after_s=(1 - use.allowance) * 60 / limit)
        use.allowance -= 1


class Keys:
    """The keys of a file. A changed file takes effect with the next request; an invalid one changes nothing."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises SettingsError if the file cannot be read or is invalid."""
        self._file = file
        self._clock = clock
        self._seen = self._version()
        self._callers = self._read()

    def caller(self, key: str) -> Caller | None:
        """The holder of a key; None if it is unknown. The time that this takes does not depend on the key."""
        self._refresh()
        digest = _digest(key)
        found = None
        for caller in self._callers:  # without an early exit, so that every key takes the same time
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
            log.error("%s; the previous keys stay valid", error)
        else:
            log.info("keys were read again: %s", ", ".join(caller.name for caller in self._callers))

    def _version(self) -> tuple[int, int, int] | None:
        """Changes when the file changes, also if the path is a symbolic link that gets another target.

        Kubernetes updates a mounted secret in this way. The time is that of the inode: it also changes when the file's
        owner or mode does, so a list that could not be read counts as soon as it can.
        """
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_ctime_ns, stat.st_ino, stat.st_size

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
