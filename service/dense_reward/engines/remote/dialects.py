"""What servers of models speak: a query -> path and body of a request, its answer -> log-probs. No connections here.

Written from vLLM 0.32 and 0.33 and SGLang 0.5.23; both give log-probs at temperature 1.
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

CLAMPED = -9999.0  # JSON has no infinity: vLLM's servers write this for it


class WireError(Exception):
    """An answer that is not what was asked for."""


class Dialect(Protocol):
    """How a model of a server is asked, and what is to be known of such a server.

    `kept_tokens`: how much shorter than its `max_model_len` a sequence must be; `health_s`: how long it may take to say
    that it is well; `max_named`: how many ids it takes at a position.
    """

    kept_tokens: ClassVar[int]
    health_s: ClassVar[float]
    max_named: ClassVar[int]

    @property
    def names_candidates(self) -> bool:
        """Whether it gives log-probs of any ids, not only the sequence's."""
        ...

    def request(self, query: Query, *, fresh: bool) -> tuple[str, bytes]:
        """Path and JSON body. `fresh`: nothing that the server remembers of equal prompts may be used."""
        ...

    def logprobs(self, query: Query, answer: bytes) -> FloatArray | None:
        """[T, K]; None where it has to be asked fresh. Raises WireError."""
        ...


@dataclass(frozen=True, slots=True)
class VllmCompletions:
    """vLLM's OpenAI route, which every vLLM server has. Gives log-probs of the whole prompt, one object a token."""

    kept_tokens: ClassVar = 1  # for the token that it samples
    health_s: ClassVar = 5.0
    max_named: ClassVar = 1

    model: str
    names_candidates: bool = False

    def request(self, query: Query, *, fresh: bool) -> tuple[str, bytes]:
        del fresh  # vLLM itself uses nothing remembered where it is asked for these
        body = {"model": self.model, "prompt": query.ids_L.tolist(), "max_tokens": 1, "temperature": 1.0}
        return "/v1/completions", orjson.dumps(body | {"prompt_logprobs": 0})

    def logprobs(self, query: Query, answer: bytes) -> FloatArray | None:
        return _of_prompt(query, _parsed(answer))


@dataclass(frozen=True, slots=True)
class VllmTokens:
    """vLLM's route for ids (`vllm serve --enable-scale-out`): no tokenizer, nothing decoded.

    `names_candidates`: by fixed-id scoring (vLLM 0.31 and later, its V2 runner), which scores wanted positions alone.
    """

    kept_tokens: ClassVar = 1
    health_s: ClassVar = 5.0
    max_named: ClassVar = 20  # unless it was started with another --max-logprobs

    model: str
    names_candidates: bool = False

    def request(self, query: Query, *, fresh: bool) -> tuple[str, bytes]:
        wanted: dict[str, Any] = {"prompt_logprobs": 0}
        if self.names_candidates:
            wanted = {
                "prompt_logprob_token_ids": query.wanted_TK.tolist(),
                "prompt_logprob_start": query.start - 1,
                "skip_reading_prefix_cache": fresh,
            }
        parameters = {"max_tokens": 1, "temperature": 1.0, "detokenize": False, **wanted}
        body = {"model": self.model, "token_ids": query.ids_L.tolist(), "sampling_params": parameters}
        return "/inference/v1/generate", orjson.dumps(body)

    def logprobs(self, query: Query, answer: bytes) -> FloatArray | None:
        parsed = _parsed(answer)
        if not self.names_candidates:
            return _of_prompt(query, parsed)
        encoded = parsed.get("prompt_token_id_logprobs")
        if encoded is None:
            return None
        try:
            values_TK = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
        except (ValueError, TypeError, EOFError) as error:
            raise WireError(f"prompt_token_id_logprobs are no array ({error})") from None
        return checked(query, values_TK)


@dataclass(frozen=True, slots=True)
class Sglang:
    """SGLang's own route. The entry at the first position asked for has no log-prob: one position more is asked for.

    `vocab_size` is known because it writes 0 for the last id of it.
    """

    kept_tokens: ClassVar = 7
    health_s: ClassVar = 25.0  # it generates a token for it, which waits for a running prefill, up to 20 seconds
    max_named: ClassVar = 1

    vocab_size: int
    lora: str | None = None
    names_candidates: bool = False

    def request(self, query: Query, *, fresh: bool) -> tuple[str, bytes]:
        del fresh  # what it remembers ends before the first position that is asked for
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
            rows = _parsed(answer)["meta_info"]["input_token_logprobs"][1:]
            ids, values_T = [row[1] for row in rows], np.array([row[0] for row in rows], dtype=np.float32)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise WireError(f"no input_token_logprobs in the answer ({error!r})") from None
        asked = query.ids_L[query.start :]
        if ids != np.where(asked == self.vocab_size - 1, 0, asked).tolist() and ids != asked.tolist():
            raise WireError("log-probs of other ids than were asked for")
        return checked(query, values_T[:, None])


def checked(query: Query, values: FloatArray) -> FloatArray:
    """Raises WireError where there is not one log-prob for each id that was named."""
    if values.shape != query.wanted_TK.shape:
        raise WireError(f"log-probs of shape {values.shape}, asked for {query.wanted_TK.shape}")
    return values.astype(np.float32, copy=False)


def _parsed(answer: bytes) -> Mapping[str, Any]:
    try:
        parsed = orjson.loads(answer)
    except orjson.JSONDecodeError as error:
        raise WireError(f"no JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise WireError("no JSON object")
    return parsed


def _of_prompt(query: Query, answer: Mapping[str, Any]) -> FloatArray:
    """From vLLM's list for the prompt: an object {id: {logprob, ...}} for each position, null for the first."""
    try:
        choice = answer["choices"][0]
        rows: Sequence[Mapping[str, Mapping[str, float]]] = choice.get("prompt_logprobs") or answer["prompt_logprobs"]
        if len(rows) != len(query.ids_L):
            raise WireError(f"log-probs of {len(rows)} tokens, asked for {len(query.ids_L)}")
        ids = query.ids_L[query.start :].tolist()
        values = [row[str(i)]["logprob"] for row, i in zip(rows[query.start :], ids, strict=True)]
        values_T = np.array(values, dtype=np.float32)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise WireError(f"no prompt_logprobs of the ids in the answer ({error!r})") from None
    values_T[values_T <= CLAMPED] = -np.inf
    return checked(query, values_T[:, None])
