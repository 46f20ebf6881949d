"""A checkpoint behind servers of vLLM or SGLang: several replicas of one model, asked over HTTP.

Equal prompts go to one replica, so that what it remembers of them serves. A replica that answers no more is left out,
and taken back once it answers, and has been proven, again. One that does answer is proven every minute: whatever
stands behind an address may have changed.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import numpy as np

from dense_reward.engines.remote.dialects import Dialect, Sglang, VllmCompletions, VllmTokens, WireError
from dense_reward.engines.remote.pair import Query
from dense_reward.errors import RETRY_UNAVAILABLE_S, CheckpointError, SequenceError, refuse
from dense_reward.records import FloatArray, Report

CONNECT_S, TELL_S, LOOK_EVERY_S, PROVE_EVERY_S = 2.0, 2.0, 1.0, 60.0
PROVE_S = 120.0
"""What a replica has for being found out, and again for being proven."""
LOOKS_MISSED = 2
"""A server that is slow to say that it is well is given another chance; one that nobody reaches is not."""
ATTEMPTS = 3
CONNECTIONS = 256
log = logging.getLogger("dense_reward")


class UnreachableError(Exception):
    """A server that did not answer a query, and may answer it another time."""


class BrokenError(UnreachableError):
    """A server that broke over a query, as those do whose engine just died, and others over that query alone."""


class RefusedError(Exception):
    """A server that takes no such query."""


@dataclass(frozen=True, slots=True)
class Access:
    """How servers are reached: the model's name there (their first one where None), a key, seconds for an answer.

    `vocab_size`: of the checkpoint, output rows.
    """

    served: str | None
    key: str | None
    timeout_s: float
    vocab_size: int


class Replica:
    """One server of a model."""

    def __init__(self, url: str, access: Access) -> None:
        self.url = url.rstrip("/")
        self.unavailable_reason: str | None = None
        self.max_length_tokens = 0
        self.dialect: Dialect = VllmCompletions("")
        self._access = access
        self._asking: set[asyncio.Future[httpx2.Response]] = set()
        self._queries = self._client(CONNECTIONS, access.timeout_s)
        self._looks = self._client(None, TELL_S)  # its own connections: never behind queries

    async def identify(self, probe: Query) -> None:
        """Find out what the server is and can do, by asking. Raises UnreachableError, CheckpointError."""
        try:
            models = {str(model["id"]): model for model in (await self._told("/v1/models"))["data"]}
            served = self._access.served or next(iter(models))
            model, first = models[served], next(iter(models.values()))
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise CheckpointError(f"{self.url} serves no model {self._access.served or ''} ({error!r})") from None
        length_tokens = model.get("max_model_len") or first.get("max_model_len")
        if length_tokens is None:
            raise CheckpointError(f"{self.url} tells no max_model_len: it is neither vLLM nor SGLang")
        reason: Exception | None = None
        for dialect in _dialects(str(model.get("owned_by")), served, self._access.vocab_size, is_first=model is first):
            try:
                await self._ask(dialect, probe)
            except (RefusedError, WireError) as error:
                reason = error
            else:
                self.dialect = dialect
                self.max_length_tokens = await self._longest(int(length_tokens))
                return
        raise CheckpointError(f"{self.url} gives no log-probs of prompts by any route that is known of it: {reason}")

    async def logprobs(self, query: Query) -> FloatArray:
        """Raises UnreachableError; SequenceError where the server refuses, or answers something else."""
        width = self.dialect.max_named
        parts = [query.wanted_TK[:, first : first + width] for first in range(0, query.wanted_TK.shape[1], width)]
        try:
            found = [await self._ask(self.dialect, replace(query, wanted_TK=part)) for part in parts]
        except (RefusedError, WireError) as error:
            raise SequenceError(f"{self.url}: {error}") from error
        return np.concatenate(found, axis=1)

    async def is_well(self) -> bool:
        """Whether the server says so. Raises UnreachableError where nobody says anything."""
        try:
            patience = httpx2.Timeout(self.dialect.health_s, connect=CONNECT_S)
            return (await self._looks.get("/health", timeout=patience)).is_success
        except httpx2.ReadTimeout:
            return False
        except httpx2.TransportError as error:
            raise UnreachableError(f"{self.url} is not reached: {error!r}") from None

    def leave_out(self, reason: str) -> None:
        """Ask it nothing more, and wait no longer for what it was asked."""
        self.unavailable_reason = reason
        for asking in self._asking:
            asking.cancel()

    async def close(self) -> None:
        await self._queries.aclose()
        await self._looks.aclose()

    def _client(self, connections: int | None, timeout_s: float) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=self.url,
            headers={} if self._access.key is None else {"Authorization": f"Bearer {self._access.key}"},
            timeout=httpx2.Timeout(timeout_s, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,
        )

    async def _told(self, path: str) -> Any:  # noqa: ANN401 - JSON
        try:
            answer = await self._looks.get(path)
        except httpx2.TransportError as error:
            raise UnreachableError(f"{self.url} is not reached: {error!r}") from None
        if answer.status_code in {401, 403}:
            cure = "wants a key" if self._access.key is None else "does not take the key that it is given"
            raise CheckpointError(f"{self.url} {cure}: --engine-key-file FILE")
        if answer.is_server_error:
            raise UnreachableError(f"{self.url} answered {answer.status_code}")
        return answer.json()

    async def _longest(self, max_model_len: int) -> int:
        """The longest sequence, in tokens: by the model, and at SGLang by its memory for keys and values."""
        longest = max_model_len - self.dialect.kept_tokens
        if not isinstance(self.dialect, Sglang):
            return longest
        refused_from = (await self._told("/server_info")).get("max_req_input_len")
        return longest if refused_from is None else min(longest, int(refused_from) - 1)

    async def _ask(self, dialect: Dialect, query: Query) -> FloatArray:
        for fresh in (False, True):
            path, body = dialect.request(query, fresh=fresh)
            found = dialect.logprobs(query, await self._post(path, body))
            if found is not None:
                return found
        raise WireError("no log-probs in the answer")

    async def _post(self, path: str, body: bytes) -> bytes:
        request = self._queries.post(path, content=body, headers={"Content-Type": "application/json"})
        asking = asyncio.ensure_future(request)
        self._asking.add(asking)
        try:
            answer = await asking
        except httpx2.TransportError as error:
            raise UnreachableError(f"{self.url} did not answer: {error!r}") from None
        except asyncio.CancelledError:
            if self.unavailable_reason is None or _is_cancelled():
                raise
            raise UnreachableError(self.unavailable_reason) from None
        finally:
            self._asking.discard(asking)
        if answer.status_code == httpx2.codes.TOO_MANY_REQUESTS or answer.status_code >= httpx2.codes.BAD_GATEWAY:
            raise UnreachableError(f"{self.url} answered {answer.status_code}")
        if not answer.is_success:
            message = f"{path} answered {answer.status_code}: {answer.text[:500]}"
            raise BrokenError(f"{self.url}{message}") if answer.is_server_error else RefusedError(message)
        return answer.content


Prove = Callable[[Sequence[Replica], Report], Awaitable[None]]
"""Raises CheckpointError where replicas' log-probs are not the checkpoint's, UnreachableError where there are none."""


class ReplicatedModel:
    """One checkpoint, on several servers. What it can do is what those can that are there when it starts."""

    def __init__(self, replicas: Sequence[Replica], probe: Query, prove: Prove, timeout_s: float) -> None:
        self.max_length_tokens = 0
        self.names_candidates = False
        self._replicas = replicas
        self._probe = probe
        self._prove = prove
        self._timeout_s = timeout_s
        self._watching: asyncio.Task[None] | None = None

    @property
    def unavailable_reason(self) -> str | None:
        """That of its first replica, where none is well."""
        troubles = [replica.unavailable_reason for replica in self._replicas]
        return None if None in troubles else troubles[0]

    async def start(self, report: Report) -> None:
        """Identify and prove the replicas, and watch them from then on; those that are away are taken when they come.

        Raises UnreachableError where all are away, CheckpointError.
        """
        for replica in self._replicas:
            try:
                async with _soon(replica.url):
                    await replica.identify(self._probe)
            except UnreachableError as error:
                replica.leave_out(str(error))
                report(f"left out until it comes: {error}")
            else:
                replica.unavailable_reason = None
                report(f"{replica.url}: {replica.dialect}, sequences of up to {replica.max_length_tokens} tokens")
        here = [replica for replica in self._replicas if replica.unavailable_reason is None]
        if not here:
            raise UnreachableError(self.unavailable_reason)
        async with _soon(", ".join(replica.url for replica in here)):
            await self._prove(here, report)
        self.max_length_tokens = min(replica.max_length_tokens for replica in here)
        self.names_candidates = all(replica.dialect.names_candidates for replica in here)
        self._watching = asyncio.create_task(self._watch())

    async def logprobs(self, query: Query) -> FloatArray:
        """Asks one replica after another.

        Raises RequestError(engine_unavailable) where none answers, SequenceError where they do, but not this.
        """
        reason = self.unavailable_reason
        try:
            async with asyncio.timeout(self._timeout_s):
                for attempt in range(ATTEMPTS):
                    await asyncio.sleep(0.1 * attempt)
                    replica = self._replica_for(query, attempt)
                    if replica is None:
                        break
                    try:
                        return await replica.logprobs(query)
                    except (SequenceError, UnreachableError) as error:
                        reason = str(error)
                        if attempt == ATTEMPTS - 1 and await _is_its_own_fault(error, replica):
                            raise SequenceError(reason) from error
        except TimeoutError:
            reason = f"a query took more than {self._timeout_s:.0f} s"
        raise refuse("engine_unavailable", f"no log-probs: {reason}", retry_after_s=RETRY_UNAVAILABLE_S)

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        for replica in self._replicas:
            await replica.close()

    def _replica_for(self, query: Query, attempt: int) -> Replica | None:
        """The same for equal prompts while it is well (rendezvous hashing), the next one at every further attempt."""
        well = [replica for replica in self._replicas if replica.unavailable_reason is None]
        if not well:
            return None
        prompt = query.ids_L[: query.prompt_tokens].tobytes()
        ranked = sorted(well, key=lambda replica: hashlib.sha256(replica.url.encode() + prompt).digest())
        return ranked[attempt % len(ranked)]

    async def _watch(self) -> None:
        looks = [self._look_after(replica) for replica in self._replicas]
        await asyncio.gather(*looks, *(self._prove_again(replica) for replica in self._replicas))

    async def _look_after(self, replica: Replica) -> None:
        """Leave the replica out while it is not well, and take it back."""
        missed = 0
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                missed = 0 if await replica.is_well() else missed + 1
                if missed >= LOOKS_MISSED:
                    raise UnreachableError(f"{replica.url} does not say that it is well")
                if replica.unavailable_reason is not None and not missed:
                    await self._take_back(replica)
            except Exception as error:  # whatever a server does wrong, it is looked at again
                _leave_out(replica, error)

    async def _prove_again(self, replica: Replica) -> None:
        """Weights may be changed in a server that runs, and another server may come to stand behind its address."""
        while True:
            await asyncio.sleep(PROVE_EVERY_S)
            try:
                if replica.unavailable_reason is None:
                    async with _soon(replica.url):
                        await self._prove([replica], log.debug)
            except Exception as error:  # whatever a server does wrong, it is looked at again
                if isinstance(error, UnreachableError) and not isinstance(error, BrokenError):
                    log.warning("not proven this time: %s", error)  # whether it is there is for looks to say
                else:
                    _leave_out(replica, error)

    async def _take_back(self, replica: Replica) -> None:
        """It may have been started anew, with whatever weights. Raises UnreachableError, CheckpointError."""
        async with _soon(replica.url):
            await replica.identify(self._probe)
        if (
            replica.max_length_tokens < self.max_length_tokens
            or self.names_candidates > replica.dialect.names_candidates
        ):
            raise CheckpointError(
                f"{replica.url} can do less than was found at start: {replica.dialect}, sequences of up to "
                f"{replica.max_length_tokens} tokens; start it as it was, or start this service anew"
            )
        async with _soon(replica.url):
            await self._prove([replica], log.info)
        replica.unavailable_reason = None
        log.info("taken back: %s", replica.url)


def _leave_out(replica: Replica, error: Exception) -> None:
    if replica.unavailable_reason != str(error):
        log.error("left out: %s", error)
    replica.leave_out(str(error))


@asynccontextmanager
async def _soon(url: str) -> AsyncIterator[None]:
    """Raises UnreachableError where the block takes too long."""
    try:
        async with asyncio.timeout(PROVE_S):
            yield
    except TimeoutError:
        raise UnreachableError(f"{url} did not answer a probe within {PROVE_S:.0f} s") from None


async def _is_its_own_fault(error: Exception, replica: Replica) -> bool:
    """Whether a query fails by itself: a server refuses it, or breaks over it and is well."""
    try:
        return isinstance(error, SequenceError) or (isinstance(error, BrokenError) and await replica.is_well())
    except UnreachableError:
        return False


def _is_cancelled() -> bool:
    """Whether somebody wants the present task to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _dialects(owner: str, served: str, vocab_size: int, *, is_first: bool) -> list[Dialect]:
    """Those that a server may understand, the best first; an adapter of SGLang is named beside its base."""
    if owner == "sglang":
        return [Sglang(vocab_size, lora=None if is_first else served)]
    return [VllmTokens(served, names_candidates=True), VllmTokens(served), VllmCompletions(served)]
