"""A checkpoint behind servers of vLLM or SGLang: several replicas of one model, asked over HTTP.

Equal prompts go to one replica, so that what it remembers of them serves. A replica that answers no more is left out,
and taken back once it answers, and has been proven, again.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from dense_reward.engine.base import FloatArray
from dense_reward.engine.foreign import Query
from dense_reward.engine.wire import Dialect, Sglang, VllmCompletions, VllmTokens, WireError
from dense_reward.errors import RETRY_UNAVAILABLE_S, CheckpointError, refuse

CONNECT_S, LOOK_S, LOOK_EVERY_S = 2.0, 2.0, 1.0
LOOKS_MISSED = 2
"""A server that is slow to say that it is well is given another chance; one that nobody reaches is not."""
ATTEMPTS = 3
CONNECTIONS = 256
log = logging.getLogger("dense_reward")


class UnreachableError(Exception):
    """A server that did not answer a query, and may answer it another time."""


class RefusedError(Exception):
    """A server that takes no such query, or broke over it (`broke`)."""

    def __init__(self, message: str, *, broke: bool) -> None:
        super().__init__(message)
        self.broke = broke


@dataclass(frozen=True, slots=True)
class Access:
    """How servers are reached: the model's name there (their first one where None), a key, seconds for an answer."""

    served: str | None
    key: str | None
    timeout_s: float


class Replica:
    """One server of a model."""

    def __init__(self, url: str, access: Access) -> None:
        self.url = url.rstrip("/")
        self.trouble: str | None = None
        self.max_length_tokens = 0
        self.dialect: Dialect = VllmCompletions("")
        self._served = access.served
        self._asking: set[asyncio.Future[httpx.Response]] = set()
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={} if access.key is None else {"Authorization": f"Bearer {access.key}"},
            timeout=httpx.Timeout(access.timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            trust_env=False,
        )

    async def identify(self, probe: Query) -> None:
        """Find out what the server is and can do, by asking. Raises UnreachableError, CheckpointError."""
        try:
            models = {str(model["id"]): model for model in (await self._models())["data"]}
            served = next(iter(models)) if self._served is None else self._served
            model, first = models[served], next(iter(models.values()))
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise CheckpointError(f"{self.url} serves no model {self._served or ''} ({error!r})") from None
        length_tokens = model.get("max_model_len") or first.get("max_model_len")
        if length_tokens is None:
            raise CheckpointError(f"{self.url} tells no max_model_len: it is neither vLLM nor SGLang")
        self.max_length_tokens = int(length_tokens) - 1  # both keep room for a token that they might sample
        for dialect in _dialects(str(model.get("owned_by")), served, is_first=model is first):
            try:
                await self._ask(dialect, probe)
            except (RefusedError, WireError) as error:
                log.debug("%s: not by %s: %s", self.url, dialect, error)
            else:
                self.dialect = dialect
                return
        raise CheckpointError(f"{self.url} gives no log-probs of prompts by any route that is known of it")

    async def logprobs(self, query: Query) -> FloatArray:
        """Raises UnreachableError; RuntimeError where the server refuses, or answers something else."""
        try:
            return await self._ask(self.dialect, query)
        except (RefusedError, WireError) as error:
            if isinstance(error, RefusedError) and error.broke:  # as servers do whose engine just died
                raise UnreachableError(f"{self.url}: {error}") from error
            raise RuntimeError(f"{self.url}: {error}") from error

    async def is_well(self) -> bool:
        """Whether the server says so. Raises UnreachableError where nobody says anything."""
        try:
            return (await self._client.get("/health", timeout=LOOK_S)).is_success
        except httpx.TimeoutException:
            return False
        except httpx.TransportError as error:
            raise UnreachableError(f"{self.url} is not reached: {error!r}") from None

    def leave_out(self, reason: str) -> None:
        """Ask it nothing more, and wait no longer for what it was asked."""
        self.trouble = reason
        for asking in self._asking:
            asking.cancel()

    async def close(self) -> None:
        await self._client.aclose()

    async def _models(self) -> Any:  # noqa: ANN401 - JSON
        try:
            answer = await self._client.get("/v1/models", timeout=LOOK_S)
        except httpx.TransportError as error:
            raise UnreachableError(f"{self.url} is not reached: {error!r}") from None
        if answer.status_code in {401, 403}:
            raise CheckpointError(f"{self.url} wants a key: --engine-key-file FILE")
        if answer.is_server_error:
            raise UnreachableError(f"{self.url} answered {answer.status_code}")
        return answer.json()

    async def _ask(self, dialect: Dialect, query: Query) -> FloatArray:
        for fresh in (False, True):
            path, body = dialect.request(query, fresh=fresh)
            found = dialect.logprobs(query, await self._post(path, body))
            if found is not None:
                return found
        raise WireError("no log-probs in the answer")

    async def _post(self, path: str, body: bytes) -> bytes:
        request = self._client.post(path, content=body, headers={"Content-Type": "application/json"})
        asking = asyncio.ensure_future(request)
        self._asking.add(asking)
        try:
            answer = await asking
        except httpx.TransportError as error:
            raise UnreachableError(f"{self.url} did not answer: {error!r}") from None
        except asyncio.CancelledError:
            if self.trouble is None or _is_cancelled():
                raise
            raise UnreachableError(self.trouble) from None
        finally:
            self._asking.discard(asking)
        if answer.status_code == httpx.codes.TOO_MANY_REQUESTS or answer.status_code >= httpx.codes.BAD_GATEWAY:
            raise UnreachableError(f"{self.url} answered {answer.status_code}")
        if not answer.is_success:
            message = f"{path} answered {answer.status_code}: {answer.text[:500]}"
            raise RefusedError(message, broke=answer.is_server_error)
        return answer.content


Report = Callable[[str], None]
Prove = Callable[[Sequence[Replica], Report], Awaitable[None]]
"""Raises CheckpointError where replicas' log-probs are not the checkpoint's, UnreachableError where there are none."""


class RemoteModel:
    """One checkpoint, on several servers."""

    def __init__(self, replicas: Sequence[Replica], probe: Query, prove: Prove) -> None:
        self._replicas = replicas
        self._probe = probe
        self._prove = prove
        self._watching: asyncio.Task[None] | None = None

    @property
    def trouble(self) -> str | None:
        """That of its first replica, where none is well."""
        troubles = [replica.trouble for replica in self._replicas]
        return None if None in troubles else troubles[0]

    @property
    def max_length_tokens(self) -> int:
        return min(replica.max_length_tokens for replica in self._replicas)

    @property
    def names_candidates(self) -> bool:
        return all(replica.dialect.names_candidates for replica in self._replicas)

    async def start(self, report: Report) -> None:
        """Identify and prove all replicas, and watch them from then on. Raises UnreachableError, CheckpointError."""
        for replica in self._replicas:
            await replica.identify(self._probe)
            report(f"{replica.url}: {replica.dialect}, sequences of up to {replica.max_length_tokens} tokens")
        await self._prove(self._replicas, report)
        self._watching = asyncio.create_task(self._watch())

    async def logprobs(self, query: Query) -> FloatArray:
        """Asks one replica after another. Raises RequestError(engine_unavailable) where none answers."""
        reason = self.trouble
        for attempt in range(ATTEMPTS):
            replica = self._replica_for(query, attempt)
            if replica is None:
                break
            try:
                return await replica.logprobs(query)
            except UnreachableError as error:
                reason = str(error)
                await asyncio.sleep(0.1 * 2**attempt)
        raise refuse("engine_unavailable", f"no log-probs: {reason}", retry_after_s=RETRY_UNAVAILABLE_S)

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        for replica in self._replicas:
            await replica.close()

    def _replica_for(self, query: Query, attempt: int) -> Replica | None:
        """The same for equal prompts while it is well (rendezvous hashing), the next one at every further attempt."""
        well = [replica for replica in self._replicas if replica.trouble is None]
        if not well:
            return None
        prompt = query.ids_L[: query.prompt_tokens].tobytes()
        ranked = sorted(well, key=lambda replica: hashlib.sha256(replica.url.encode() + prompt).digest())
        return ranked[attempt % len(ranked)]

    async def _watch(self) -> None:
        await asyncio.gather(*(self._watch_one(replica) for replica in self._replicas))

    async def _watch_one(self, replica: Replica) -> None:
        """Leave the replica out while it is not well, and take it back."""
        missed = 0
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                missed = 0 if await replica.is_well() else missed + 1
                if missed >= LOOKS_MISSED:
                    raise UnreachableError(f"{replica.url} does not say that it is well")
                if replica.trouble is not None and not missed:
                    await self._take_back(replica)
            except Exception as error:  # whatever a server does wrong, it is looked at again
                if replica.trouble != str(error):
                    log.error("left out: %s", error)
                replica.leave_out(str(error))

    async def _take_back(self, replica: Replica) -> None:
        """It may have been started anew, with whatever weights. Raises UnreachableError, CheckpointError."""
        await replica.identify(self._probe)
        await self._prove([replica], log.info)
        replica.trouble = None
        log.info("taken back: %s", replica.url)


def _is_cancelled() -> bool:
    """Whether somebody wants the present task to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _dialects(owner: str, served: str, *, is_first: bool) -> list[Dialect]:
    """Those that a server may understand, the best first; an adapter of SGLang is named beside its base."""
    if owner == "sglang":
        return [Sglang(lora=None if is_first else served)]
    return [VllmTokens(served, names_candidates=True), VllmTokens(served), VllmCompletions(served)]
