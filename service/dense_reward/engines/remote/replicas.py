"""A checkpoint on servers of vLLM or SGLang: a pool of replicas of one model, queried over HTTP.

Equal prompts are routed to one replica, so that its prefix cache helps. A replica that fails its health check is
excluded, and readmitted once it is healthy and verified again. Healthy replicas are verified every minute, because the
weights or the server behind an address can change. Names are resolved again every few seconds, so replicas come and go.
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

from dense_reward.answers import answer_within
from dense_reward.engines.remote.addresses import FOLLOWED, server_urls
from dense_reward.engines.remote.dialects import Dialect, Sglang, VllmCompletions, WireError, dialects_to_try
from dense_reward.engines.remote.pair import Query
from dense_reward.errors import CheckpointError, SequenceError, engine_unavailable
from dense_reward.records import FloatArray, Report

CONNECT_TIMEOUT_S, STATUS_TIMEOUT_S, RETRY_DELAY_S = 2.0, 2.0, 0.1
HEALTH_CHECK_EVERY_S, RESOLVE_EVERY_S, VERIFY_EVERY_S = 1.0, 5.0, 60.0
VERIFY_TIMEOUT_S = 120.0
"""For identifying a replica, and again for verifying it."""
FAILED_CHECKS_TO_EXCLUDE = 2
"""Health checks in a row. A replica that cannot be reached is excluded after the first."""
ATTEMPTS, MAX_CONNECTIONS, JSON_TYPE = 3, 256, {"Content-Type": "application/json"}
log = logging.getLogger("dense_reward")


class UnreachableError(Exception):
    """A server did not answer a query, but can answer it later."""


class BrokenError(UnreachableError):
    """A server failed with 500: either its engine has died, or only this query makes it fail."""


class RefusedError(Exception):
    """A server rejects a query with a 4xx status."""


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """How to query a model's servers.

    `served` is the model's name there; None for the first one that they list. `timeout_s` is the limit for one query.
    `vocab_size` is the number of output rows of the checkpoint.
    """

    served: str | None
    key: str | None
    timeout_s: float
    vocab_size: int


class Replica:
    """One server of a model."""

    def __init__(self, url: str, access: ServerAccess) -> None:
        self.url = url.rstrip("/")
        self.unavailable_reason: str | None = None
        self.max_length_tokens = 0
        self.dialect: Dialect = VllmCompletions("")
        self._access = access
        self._in_flight: set[asyncio.Future[httpx2.Response]] = set()
        self._query_client = self._client(MAX_CONNECTIONS, access.timeout_s)
        self._status_client = self._client(None, STATUS_TIMEOUT_S)  # separate: a health check never queues for queries

    async def identify(self, probe: Query) -> None:
        """Determine the server's dialect and limits by requests. Raises UnreachableError, CheckpointError."""
        try:
            models = {str(model["id"]): model for model in (await self._get_json("/v1/models"))["data"]}
            served = self._access.served or next(iter(models))
            model, first = models[served], next(iter(models.values()))
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise CheckpointError(f"{self.url} serves no model {self._access.served or ''} ({error!r})") from None
        length_tokens = model.get("max_model_len") or first.get("max_model_len")
        if length_tokens is None:
            raise CheckpointError(f"{self.url} reports no max_model_len: it is neither vLLM nor SGLang")
        reason: Exception | None = None
        for dialect in dialects_to_try(
            str(model.get("owned_by")), served, self._access.vocab_size, is_first=model is first
        ):
            try:
                await self._query(dialect, probe)
            except (RefusedError, WireError) as error:
                reason = error
            else:
                self.dialect = dialect
                self.max_length_tokens = await self._longest_sequence(int(length_tokens))
                return
        raise CheckpointError(f"{self.url} returns no log-probs of prompts by any route that is tried: {reason}")

    async def logprobs(self, query: Query) -> FloatArray:
        """Raises UnreachableError; SequenceError if the server rejects the query or its answer is invalid."""
        width = self.dialect.max_ids_per_position
        parts = [query.wanted_TK[:, first : first + width] for first in range(0, query.wanted_TK.shape[1], width)]
        try:
            parts_TK = [await self._query(self.dialect, replace(query, wanted_TK=part)) for part in parts]
        except (RefusedError, WireError) as error:
            raise SequenceError(f"{self.url}: {error}") from error
        return np.concatenate(parts_TK, axis=1)

    async def is_healthy(self) -> bool:
        """Whether the server's health check succeeds in time. Raises UnreachableError if no connection is possible."""
        try:
            timeout = httpx2.Timeout(self.dialect.health_timeout_s, connect=CONNECT_TIMEOUT_S)
            return (await self._status_client.get("/health", timeout=timeout)).is_success
        except httpx2.ReadTimeout:
            return False
        except httpx2.TransportError as error:
            raise UnreachableError(f"{self.url} cannot be reached: {error!r}") from None

    def exclude(self, reason: str) -> None:
        """Route no more queries to it, and fail those in flight."""
        self.unavailable_reason = reason
        for call in self._in_flight:
            call.cancel()

    async def close(self) -> None:
        await self._query_client.aclose()
        await self._status_client.aclose()

    def _client(self, connections: int | None, timeout_s: float) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=self.url,
            headers={} if self._access.key is None else {"Authorization": f"Bearer {self._access.key}"},
            timeout=httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,
        )

    async def _get_json(self, path: str) -> Any:  # noqa: ANN401 - JSON
        try:
            client = self._status_client
            answer = await answer_within(STATUS_TIMEOUT_S, client, client.build_request("GET", path))
        except httpx2.TransportError as error:
            raise UnreachableError(f"{self.url} cannot be reached: {error!r}") from None
        if answer.status_code in {401, 403}:
            reason = "requires a key: pass" if self._access.key is None else "rejects the key: correct that of"
            raise CheckpointError(f"{self.url} {reason} --engine-key-file FILE")
        if answer.is_server_error:
            raise UnreachableError(f"{self.url} answered {answer.status_code}")
        return answer.json()

    async def _longest_sequence(self, max_model_len: int) -> int:
        """In tokens: limited by the model, and for SGLang also by its memory for keys and values."""
        longest = max_model_len - self.dialect.reserved_tokens
        if not isinstance(self.dialect, Sglang):
            return longest
        refused_from = (await self._get_json("/server_info")).get("max_req_input_len")
        return longest if refused_from is None else min(longest, int(refused_from) - 1)

    async def _query(self, dialect: Dialect, query: Query) -> FloatArray:
        for skip_cache in (False, True):
            path, body = dialect.request(query, skip_cache=skip_cache)
            if (logprobs_TK := dialect.logprobs(query, await self._post(path, body))) is not None:
                return logprobs_TK
        raise WireError("no log-probs in the answer")

    async def _post(self, path: str, body: bytes) -> bytes:
        sent = self._query_client.build_request("POST", path, content=body, headers=JSON_TYPE)
        call = asyncio.ensure_future(answer_within(self._access.timeout_s, self._query_client, sent))
        self._in_flight.add(call)
        try:
            answer = await call
        except httpx2.TransportError as error:
            raise UnreachableError(f"{self.url} did not answer: {error!r}") from None
        except asyncio.CancelledError:
            # `exclude` cancels only the call: an error then. A cancelled task must stay cancelled.
            if self.unavailable_reason is None or _is_task_cancelled():
                raise
            raise UnreachableError(self.unavailable_reason) from None
        finally:
            self._in_flight.discard(call)
        if answer.status_code == httpx2.codes.TOO_MANY_REQUESTS or answer.status_code >= httpx2.codes.BAD_GATEWAY:
            raise UnreachableError(f"{self.url} answered {answer.status_code}")
        if not answer.is_success:
            message = f"{path} answered {answer.status_code}: {answer.text[:500]}"
            raise BrokenError(f"{self.url}{message}") if answer.is_server_error else RefusedError(message)
        return answer.content


Verify = Callable[[Sequence[Replica], Report], Awaitable[None]]
"""Raises CheckpointError if a replica's log-probs are not the checkpoint's, UnreachableError if one does not answer."""


class ReplicatedModel:
    """One checkpoint on several servers.

    Its capabilities are the intersection of those of the replicas that are up at start.
    """

    def __init__(self, urls: Sequence[str], access: ServerAccess, probe: Query, verify: Verify) -> None:
        self.max_length_tokens = 0
        self.scores_candidates = False
        self._urls, self._access, self._probe, self._verify = urls, access, probe, verify
        self._replicas: list[Replica] = []
        self._tasks: dict[Replica, asyncio.Task[None]] = {}
        self._following: asyncio.Task[None] | None = None

    @property
    def unavailable_reason(self) -> str | None:
        """The first replica's reason if all are unavailable, else None. There are replicas once it has started."""
        reasons = [replica.unavailable_reason for replica in self._replicas]
        return None if None in reasons else reasons[0]

    async def start(self, report: Report) -> None:
        """Identify and verify the replicas, then monitor them. One that is down now is admitted when it comes up.

        Raises UnreachableError if none is up, CheckpointError.
        """
        try:
            _, left = await self._resolve()
        except OSError as error:
            raise UnreachableError(f"{', '.join(self._urls)}: {error}") from None
        for replica in left:
            await replica.close()
        for replica in self._replicas:
            try:
                async with _verification_timeout(replica.url):
                    await replica.identify(self._probe)
            except UnreachableError as error:
                replica.exclude(str(error))
                report(f"excluded until it is up: {error}")
            else:
                replica.unavailable_reason = None
                report(f"{replica.url}: {replica.dialect}, sequences of up to {replica.max_length_tokens} tokens")
        available = [replica for replica in self._replicas if replica.unavailable_reason is None]
        if not available:
            raise UnreachableError(self.unavailable_reason)
        async with _verification_timeout(", ".join(replica.url for replica in available)):
            await self._verify(available, report)
        self.max_length_tokens = min(replica.max_length_tokens for replica in available)
        self.scores_candidates = all(replica.dialect.scores_candidates for replica in available)
        self._tasks = {replica: asyncio.create_task(self._monitor(replica)) for replica in self._replicas}
        if any(url.startswith(FOLLOWED) for url in self._urls):
            self._following = asyncio.create_task(self._follow())

    async def logprobs(self, query: Query) -> FloatArray:
        """The log-probs by one replica; if it fails, by the next.

        Raises RequestError(engine_unavailable) if no replica answers, SequenceError if only this query fails.
        """
        reason = self.unavailable_reason
        try:
            async with asyncio.timeout(self._access.timeout_s):
                for attempt in range(ATTEMPTS):
                    await asyncio.sleep(RETRY_DELAY_S * attempt)
                    replica = self._replica_for(query, attempt)
                    if replica is None:
                        break
                    try:
                        return await replica.logprobs(query)
                    except (SequenceError, UnreachableError) as error:
                        reason = str(error)
                        if attempt == ATTEMPTS - 1 and await _is_fault_of_query(error, replica):
                            raise SequenceError(reason) from error
        except TimeoutError:
            reason = f"a query took more than {self._access.timeout_s:.0f} s"
        log.warning("no log-probs: %s", reason)
        raise engine_unavailable()

    async def close(self) -> None:
        replicas = {*self._replicas, *self._tasks}  # those that leave are only in the second
        running = [task for task in (*self._tasks.values(), self._following) if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for replica in replicas:
            await replica.close()

    def _replica_for(self, query: Query, attempt: int) -> Replica | None:
        """Rendezvous hashing: equal prompts get the same replica while it is available. Each attempt takes the next."""
        available = [replica for replica in self._replicas if replica.unavailable_reason is None]
        if not available:
            return None
        prompt = query.ids_L[: query.prompt_tokens].tobytes()
        ranked = sorted(available, key=lambda replica: hashlib.sha256(replica.url.encode() + prompt).digest())
        return ranked[attempt % len(ranked)]

    async def _resolve(self) -> tuple[list[Replica], list[Replica]]:
        """The replicas that are new at the names, and those that have left. Raises OSError if a name has no address."""
        urls = await server_urls(self._urls)
        known = {replica.url for replica in self._replicas}
        left = [replica for replica in self._replicas if replica.url not in urls]
        new = [Replica(url, self._access) for url in urls if url not in known]
        self._replicas = [replica for replica in self._replicas if replica.url in urls] + new
        return new, left

    async def _follow(self) -> None:
        """Verify and use replicas that appear at the names. One that leaves gets no more queries, and ends its last."""
        while True:
            await asyncio.sleep(RESOLVE_EVERY_S)
            try:
                new, left = await self._resolve()
            except OSError as error:  # the resolver is down, or no replica is ready: the health checks decide then
                log.debug("%s: %s", ", ".join(self._urls), error)
                continue
            for replica in new:
                log.info("found: %s", replica.url)
                replica.exclude(f"{replica.url} is not verified yet")
                self._tasks[replica] = asyncio.create_task(self._monitor(replica))
            for replica in left:
                log.info("left: %s", replica.url)
                self._tasks.pop(replica).cancel()
                self._tasks[replica] = asyncio.create_task(self._leave(replica))

    async def _leave(self, replica: Replica) -> None:
        """Close it once its last query, which takes at most `timeout_s`, has ended."""
        await asyncio.sleep(self._access.timeout_s)
        del self._tasks[replica]
        await replica.close()

    async def _monitor(self, replica: Replica) -> None:
        await asyncio.gather(self._monitor_health(replica), self._verify_periodically(replica))

    async def _monitor_health(self, replica: Replica) -> None:
        """Exclude the replica while it is not healthy, and readmit it afterwards."""
        failed = 0
        while True:
            await asyncio.sleep(HEALTH_CHECK_EVERY_S)
            try:
                failed = 0 if await replica.is_healthy() else failed + 1
                if failed >= FAILED_CHECKS_TO_EXCLUDE:
                    raise UnreachableError(f"{replica.url} is not healthy: {failed} health checks failed in a row")
                if replica.unavailable_reason is not None and not failed:
                    await self._readmit(replica)
            except Exception as error:  # whatever a server does wrong, the checks must go on
                _exclude(replica, error)

    async def _verify_periodically(self, replica: Replica) -> None:
        """A running server can load other weights, and another server can get its address."""
        while True:
            await asyncio.sleep(VERIFY_EVERY_S)
            try:
                if replica.unavailable_reason is None:
                    async with _verification_timeout(replica.url):
                        await self._verify([replica], log.debug)
            except Exception as error:  # whatever a server does wrong, the checks must go on
                if isinstance(error, UnreachableError) and not isinstance(error, BrokenError):
                    log.warning("not verified this time: %s", error)  # the health check decides whether it is up
                else:
                    _exclude(replica, error)

    async def _readmit(self, replica: Replica) -> None:
        """Identify and verify it again: it can have restarted with other weights or options.

        Raises UnreachableError, CheckpointError.
        """
        async with _verification_timeout(replica.url):
            await replica.identify(self._probe)
        if (
            replica.max_length_tokens < self.max_length_tokens
            or self.scores_candidates > replica.dialect.scores_candidates
        ):
            raise CheckpointError(
                f"{replica.url} can do less than when this service started: {replica.dialect}, sequences of "
                f"up to {replica.max_length_tokens} tokens; start it with its former options, or restart this service"
            )
        async with _verification_timeout(replica.url):
            await self._verify([replica], log.info)
        replica.unavailable_reason = None
        log.info("readmitted: %s", replica.url)


def _exclude(replica: Replica, error: Exception) -> None:
    if replica.unavailable_reason != str(error):  # a change, not every health check
        log.error("excluded: %s", error)
    replica.exclude(str(error))


@asynccontextmanager
async def _verification_timeout(url: str) -> AsyncIterator[None]:
    """Raises UnreachableError if the block takes longer than VERIFY_TIMEOUT_S."""
    try:
        async with asyncio.timeout(VERIFY_TIMEOUT_S):
            yield
    except TimeoutError:
        raise UnreachableError(f"{url} did not answer a probe within {VERIFY_TIMEOUT_S:.0f} s") from None


async def _is_fault_of_query(error: Exception, replica: Replica) -> bool:
    """Whether only this query fails: the server rejects it, or fails with 500 and is healthy nevertheless."""
    try:
        return isinstance(error, SequenceError) or (isinstance(error, BrokenError) and await replica.is_healthy())
    except UnreachableError:
        return False


def _is_task_cancelled() -> bool:
    """Whether the running task itself was cancelled, not only a future that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
