"""The wire formats of vLLM and SGLang: turns a query into an HTTP request, and the answer into log-probs.

Opens no connections. Written from vLLM 0.32 and 0.33 and SGLang 0.5.23; all return log-probs at temperature 1.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import orjson

from dense_reward.engines.remote.pair import Query
from dense_reward.records import FloatArray

CLAMPED_LOGPROB = -9999.0  # JSON has no infinity: vLLM's servers write this for minus infinity


class WireError(Exception):
    """An answer does not hold the log-probs that were requested."""


class Dialect(Protocol):
    """How to query one kind of server, and its limits.

    A sequence must be `reserved_tokens` shorter than the server's `max_model_len`. A health check fails after
    `health_timeout_s`. One request scores at most `max_ids_per_position` ids at a position.
    """

    reserved_tokens: ClassVar[int]
    health_timeout_s: ClassVar[float]
    max_ids_per_position: ClassVar[int]

    @property
    def scores_candidates(self) -> bool:
        """Whether it scores any ids at a position, not only the sequence's own."""
        ...

    def request(self, query: Query, *, skip_cache: bool) -> tuple[str, bytes]:
        """Path and JSON body. `skip_cache`: the server must not read its prefix cache."""
        ...

    def logprobs(self, query: Query, answer: bytes) -> FloatArray | None:
        """[T, K]; None if the query must be sent again with `skip_cache`. Raises WireError."""
        ...


MOST_LOGPROB = 1e-3
"""Rounding can lift the log-prob of a certain token this far above 0."""


@dataclass(frozen=True, slots=True)
class VllmCompletions:
    """vLLM's OpenAI route, which every vLLM server has. It returns one JSON object for each token of the prompt."""

    reserved_tokens: ClassVar = 1  # for the token that it samples
    health_timeout_s: ClassVar = 5.0
    max_ids_per_position: ClassVar = 1

    model: str
    scores_candidates: bool = False

    def request(self, query: Query, *, skip_cache: bool) -> tuple[str, bytes]:
        del skip_cache  # vLLM itself skips its prefix cache if prompt log-probs are requested
        body = {"model": self.model, "prompt": query.ids_L.tolist(), "max_tokens": 1, "temperature": 1.0}
        return "/v1/completions", orjson.dumps(body | {"prompt_logprobs": 0})

    def logprobs(self, query: Query, answer: bytes) -> FloatArray | None:
        return _prompt_logprobs(query, _json_object(answer))


@dataclass(frozen=True, slots=True)
class VllmTokens:
    """vLLM's route for ids (`vllm serve --enable-scale-out`), which needs no tokenizer and decodes nothing.

    `scores_candidates`: with fixed-id scoring (vLLM 0.31 and later, its V2 runner), which scores only wanted positions.
    """

    reserved_tokens: ClassVar = 1
    health_timeout_s: ClassVar = 5.0
    max_ids_per_position: ClassVar = 20  # vLLM's default of --max-logprobs

    model: str
    scores_candidates: bool = False

    def request(self, query: Query, *, skip_cache: bool) -> tuple[str, bytes]:
        wanted: dict[str, Any] = {"prompt_logprobs": 0}
        if self.scores_candidates:
            wanted = {
                "prompt_logprob_token_ids": query.wanted_TK.tolist(),
                "prompt_logprob_start": query.start - 1,
                "skip_reading_prefix_cache": skip_cache,
            }
        parameters = {"max_tokens": 1, "temperature": 1.0, "detokenize": False, **wanted}
        body = {"model": self.model, "token_ids": query.ids_L.tolist(), "sampling_params": parameters}
        return "/inference/v1/generate", orjson.dumps(body)

    def logprobs(self, query: Query, answer: bytes) -> FloatArray | None:
        parsed = _json_object(answer)
        if not self.scores_candidates:
            return _prompt_logprobs(query, parsed)
        encoded = parsed.get("prompt_token_id_logprobs")
        if encoded is None:
            return None
        try:
            values_TK = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
        except (ValueError, TypeError, EOFError) as error:
            raise WireError(f"prompt_token_id_logprobs is not an array in NumPy's format ({error})") from None
        return checked(query, values_TK)


@dataclass(frozen=True, slots=True)
class Sglang:
    """SGLang's own route. Its first entry has no log-prob, so the request starts one position earlier.

    `vocab_size` is needed because SGLang writes 0 in place of the last id of the vocabulary.
    """

    reserved_tokens: ClassVar = 7
    health_timeout_s: ClassVar = 25.0  # /health generates a token, which waits up to 20 s for a running prefill
    max_ids_per_position: ClassVar = 1

    vocab_size: int
    lora: str | None = None
    scores_candidates: bool = False

    def request(self, query: Query, *, skip_cache: bool) -> tuple[str, bytes]:
        del skip_cache  # SGLang reads its prefix cache only before the first requested position
        body: dict[str, Any] = {
            "input_ids": query.ids_L.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": query.start - 1,
            "return_text_in_logprobs": False,
        }
        return "/generate", orjson.dumps(body if self.lora is None else body | {"lora_path": self.lora})

    def logprobs(self, query: Query, answer: bytes) -> FloatArray | None:
        try:
            rows = _json_object(answer)["meta_info"]["input_token_logprobs"][1:]
            ids, values_T = [row[1] for row in rows], _floats([row[0] for row in rows])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise WireError(f"no input_token_logprobs in the answer ({error!r})") from None
        expected_T = query.ids_L[query.start :]
        if ids != np.where(expected_T == self.vocab_size - 1, 0, expected_T).tolist() and ids != expected_T.tolist():
            raise WireError("log-probs of other ids than were requested")
        return checked(query, values_T[:, None])


def checked(query: Query, values: FloatArray) -> FloatArray:
    """The values in float32. Raises WireError if there is not one for each wanted id."""
    if values.shape != query.wanted_TK.shape:
        raise WireError(f"log-probs of shape {values.shape}, but {query.wanted_TK.shape} were requested")
    if values.dtype.kind != "f" or not (values <= MOST_LOGPROB).all():  # NaN fails too
        raise WireError("the answer holds values that are no log-probs: not numbers, or above 0")
    return values.astype(np.float32, copy=False)


def _floats(values: Sequence[object]) -> FloatArray:
    """Raises ValueError for what NumPy would convert: true, and numbers in strings."""
    if not all(type(value) in (int, float) for value in values):
        raise ValueError("a log-prob is not a number")
    return np.array(values, dtype=np.float32)


def _json_object(answer: bytes) -> Mapping[str, Any]:
    try:
        parsed = orjson.loads(answer)
    except orjson.JSONDecodeError as error:
        raise WireError(f"the answer is not JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise WireError("the answer is not a JSON object")
    return parsed


def _prompt_logprobs(query: Query, answer: Mapping[str, Any]) -> FloatArray:
    """Reads vLLM's list for the prompt: an object {id: {logprob, ...}} for each position, null for the first."""
    try:
        choice = answer["choices"][0]
        rows: Sequence[Mapping[str, Mapping[str, float]]] = choice.get("prompt_logprobs") or answer["prompt_logprobs"]
        if len(rows) != len(query.ids_L):
            raise WireError(f"log-probs of {len(rows)} tokens, but {len(query.ids_L)} were sent")
        ids = query.ids_L[query.start :].tolist()
        values = [row[str(i)]["logprob"] for row, i in zip(rows[query.start :], ids, strict=True)]
        values_T = _floats(values)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise WireError(f"the answer has no prompt_logprobs of the ids that were sent ({error!r})") from None
    values_T[values_T <= CLAMPED_LOGPROB] = -np.inf
    return checked(query, values_T[:, None])


def dialects_to_try(owner: str, served: str, vocab_size: int, *, is_first: bool) -> list[Dialect]:
    """The best first. `is_first`: the server lists this model first; SGLang lists its base model before adapters."""
    if owner == "sglang":
        return [Sglang(vocab_size, lora=None if is_first else served)]
    return [VllmTokens(served, scores_candidates=True), VllmTokens(served), VllmCompletions(served)]
