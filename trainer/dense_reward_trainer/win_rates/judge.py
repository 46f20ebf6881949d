"""A judge behind a URL that speaks OpenAI's chat completions. Each reply is on the disk before the next is waited for.

A reply is kept under a hash of the request, so a job that goes on asks only for what is missing.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
from dense_reward.answers import read_all
from dense_reward.records import Report

from dense_reward_trainer.configs.judge import JudgeOptions
from dense_reward_trainer.data.records import DataError
from dense_reward_trainer.errors import ConfigError, JobError
from dense_reward_trainer.runs.progress import Progress

Request = Mapping[str, Any]
Kept = dict[str, dict[str, Any]]
_LONGEST_WAIT_S = 60.0
_LONGEST_BODY = 300


def request_key(request: Request) -> str:
    """The hash under which the reply to a request is kept."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_kept(path: Path) -> Kept:
    """Key -> kept reply with its request. A last line that a kill cut off is removed from the file.

    Raises DataError for any other line that is damaged.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    kept: Kept = {}
    for number, content in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(content)
            kept[line["key"]] = {"reply": _checked(line["reply"])}
        except (ValueError, KeyError, TypeError, IndexError):
            raise DataError(f"{path}:{number} is damaged: delete this line, and its reply is asked for again") from None
    return kept


class Judge:
    """Asks one judge. Raises ConfigError if the variable with its key is empty."""

    def __init__(self, options: JudgeOptions, report: Report) -> None:
        headers = {}
        if options.api_key_variable is not None:
            key = os.environ.get(options.api_key_variable, "")
            if not key:
                raise ConfigError(f"the judge's key is read from {options.api_key_variable}, which is not set: set it")
            headers["Authorization"] = f"Bearer {key}"
        self._options, self._report, self._stop = options, report, threading.Event()
        limits = httpx2.Limits(max_connections=options.concurrency)
        self._http = httpx2.Client(headers=headers, timeout=options.timeout_s, limits=limits)

    def ask(self, requests: Sequence[Request], path: Path) -> Kept:
        """The replies to all requests by key; those in the file at `path` are not asked for once more.

        Raises JobError if the judge refuses, or still fails after all retries. What was answered is kept.
        """
        kept = read_kept(path)
        wanted = {request_key(request): request for request in requests}
        missing = {key: request for key, request in wanted.items() if key not in kept}
        with (
            Progress(len(wanted), "verdicts", len(wanted) - len(missing)) as progress,
            ThreadPoolExecutor(self._options.concurrency) as pool,
            path.open("ab") as file,
        ):
            say, lock = progress.beside(self._report), threading.Lock()

            def answered(key: str, request: Request) -> dict[str, Any]:
                """A thread asks for its next reply only when this one is on the disk: a killed job has paid for it."""
                line = {"key": key, "request": request, "reply": self._reply(request, say)}
                with lock:
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                return line

            waiting = [pool.submit(answered, key, request) for key, request in missing.items()]
            try:
                for future in as_completed(waiting):
                    line = future.result()
                    kept[line["key"]] = line
                    progress.advance(tokens=_tokens(line["reply"]))
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return kept

    def _reply(self, request: Request, say: Report) -> dict[str, Any]:
        """One reply. What is no chat completion is tried again, as are rate limits and errors; all are reported."""
        url = f"{self._options.url.rstrip('/')}/chat/completions"
        for attempt in range(self._options.retries + 1):
            wait_s = min(2.0**attempt, _LONGEST_WAIT_S)
            try:
                with closing(
                    self._http.send(self._http.build_request("POST", url, json=request), stream=True)
                ) as coming:
                    response = read_all(coming, self._options.timeout_s)
            except httpx2.RequestError as error:
                fault = f"{type(error).__name__}: {error}"
            else:
                fault = f"HTTP {response.status_code}: {response.text[:_LONGEST_BODY]}"
                if response.status_code == 200:
                    reply = _completion(response)
                    if reply is not None:
                        return reply
                    fault = f"no chat completion: {response.text[:_LONGEST_BODY]!r}"
                elif response.status_code not in (408, 409, 429) and response.status_code < 500:
                    raise JobError(f"the judge at {url} refuses: {fault}")
                wait_s = _retry_after(response.headers.get("retry-after"), wait_s)
            if attempt < self._options.retries and not self._stop.is_set():
                tries = f"retry {attempt + 1} of {self._options.retries}"
                say(f"the judge {self._options.model} failed ({fault}); {tries} in {wait_s:g} s")
                self._stop.wait(wait_s)
            if self._stop.is_set():
                break
        raise JobError(
            f"the judge at {url} failed {self._options.retries + 1} times ({fault}): what it has answered is kept, so "
            "start the job again later, or set a lower concurrency"
        )


def _completion(response: httpx2.Response) -> dict[str, Any] | None:
    """The reply, None if it is no chat completion. Half of a surrogate pair, which no file can hold, becomes a `?`."""
    try:
        reply: dict[str, Any] = json.loads(json.dumps(response.json(), ensure_ascii=False).encode(errors="replace"))
        return _checked(reply)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def _checked(reply: dict[str, Any]) -> dict[str, Any]:
    """The reply. Raises KeyError, IndexError or TypeError if it holds no message."""
    if not isinstance(reply["choices"][0]["message"], dict):
        raise TypeError("message")
    return reply


def _tokens(reply: Mapping[str, Any]) -> int:
    """Tokens of the request and the reply; 0 if the server does not say."""
    usage = reply.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else 0


def _retry_after(header: str | None, otherwise_s: float) -> float:
    """Seconds; a date, which the header can hold too, counts as absent."""
    try:
        wait_s = float(header or "")
    except ValueError:
        return otherwise_s
    return min(wait_s, _LONGEST_WAIT_S) if wait_s >= 0 else otherwise_s
