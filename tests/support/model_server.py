"""A stand-in for a server of vLLM or SGLang: their wire formats, log-probs by plain transformers, injected faults.

`python model_server.py FOLDER PORT WIRE_FORMAT` runs it in processes that a test can kill: see `main`.
"""

import base64
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

WireFormat = Literal["vllm", "vllm_tokens", "vllm_fixed_ids", "sglang"]
Json = Mapping[str, Any]
MAX_MODEL_LEN = 96
MAX_LOGPROBS = 20
Fault = Callable[["Handler"], None]


class NoSuchRouteError(Exception):
    """The path is unknown: answered with 404."""


@cache
def loaded(folder: Path) -> Any:  # noqa: ANN401 - transformers has no type for it
    """The model of a checkpoint, in float32; the servers of a process share it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


class Listener(ThreadingHTTPServer):
    """Accepts a whole probe at once: with the default backlog of 5, connections wait for retries of TCP."""

    daemon_threads = True
    request_queue_size = 256


COMPUTING = threading.Lock()


@lru_cache(maxsize=1000)  # services verify the same probe again and again
def computed_LV(model: Any, ids: tuple[int, ...]) -> NDArray[np.float32]:  # noqa: ANN401 - as in `loaded`
    with torch.inference_mode():
        logits_LV = model(torch.tensor([ids])).logits[0].float()
        values: NDArray[np.float32] = torch.log_softmax(logits_LV, -1).numpy()
    return np.concatenate([np.full_like(values[:1], np.nan), values[:-1]])


@dataclass(slots=True)
class ModelServer:
    """A context manager. Each of `faults` replaces the answer to one POST."""

    folder: Path
    wire_format: WireFormat = "vllm"
    port: int = 0
    host: str = "127.0.0.1"
    served: str = "tiny"
    key: str | None = None
    healthy: bool = True
    health_delay_s: float = 0.0
    max_model_len: int = MAX_MODEL_LEN
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, Json]] = field(default_factory=list)
    health_checks: int = 0
    model: Any = None
    _seen: set[tuple[int, ...]] = field(default_factory=set)
    _server: Listener | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> Self:
        if self.model is None:
            self.model = loaded(self.folder)
        handler = type("OwnHandler", (Handler,), {"owner": self})
        self._server = Listener((self.host, self.port), handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Answer no more requests, also on connections that are open."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def is_stopped(self) -> bool:
        return self._server is None

    def models(self) -> Json:
        owner = "sglang" if self.wire_format == "sglang" else "vllm"
        card = {
            "id": self.served,
            "object": "model",
            "owned_by": owner,
            "root": "tiny",
            "max_model_len": self.max_model_len,
        }
        return {"object": "list", "data": [card]}

    @property
    def max_req_input_len(self) -> int:
        """SGLang refuses sequences of this length and longer."""
        return self.max_model_len - 6

    def answer(self, path: str, body: Json) -> Json:
        match self.wire_format, path:
            case (("vllm" | "vllm_tokens" | "vllm_fixed_ids"), "/v1/completions"):
                return self._completions(body)
            case (("vllm_tokens" | "vllm_fixed_ids"), "/inference/v1/generate"):
                return self._tokens(body)
            case "sglang", "/generate":
                return self._sglang(body)
            case _:
                raise NoSuchRouteError

    def logprobs_LV(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Row t is log p(. | ids[:t]) for t >= 1; row 0 is NaN."""
        with COMPUTING:
            return computed_LV(self.model, tuple(ids))

    def _completions(self, body: Json) -> Json:
        if body["model"] != self.served or body["prompt_logprobs"] != 0 or body["max_tokens"] != 1:
            raise ValueError(f"cannot be answered: {sorted(body)}")
        choice = {
            "index": 0,
            "text": "a",
            "finish_reason": "length",
            "prompt_logprobs": self._prompt_entries(body["prompt"]),
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": self.served, "choices": [choice]}

    def _tokens(self, body: Json) -> Json:
        parameters, ids = body["sampling_params"], body["token_ids"]
        answer: dict[str, Any] = {"request_id": "1", "choices": [{"index": 0, "token_ids": [1]}]}
        answer |= {"prompt_logprobs": None, "prompt_token_id_logprobs": None}
        ids_TK, start = parameters.get("prompt_logprob_token_ids"), parameters.get("prompt_logprob_start")
        if ids_TK is None:
            return answer | {"prompt_logprobs": self._prompt_entries(ids)}
        if self.wire_format != "vllm_fixed_ids":
            raise ValueError("prompt_logprob_token_ids requires the V2 model runner")
        if len(ids_TK) != len(ids) - 1 - start or len(ids_TK[0]) > MAX_LOGPROBS:
            raise ValueError(f"{len(ids_TK)} rows of {len(ids_TK[0])}")
        if tuple(ids) in self._seen and not parameters["skip_reading_prefix_cache"]:
            return answer  # like vLLM, whose cached prefix then covers the first row
        self._seen.add(tuple(ids))
        values_TK = np.take_along_axis(self.logprobs_LV(ids)[start + 1 :], np.array(ids_TK), axis=1)
        file = io.BytesIO()
        np.save(file, values_TK)
        return answer | {"prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}

    def _prompt_entries(self, ids: Sequence[int]) -> list[Json | None]:
        values_LV = self.logprobs_LV(ids)
        return [
            {str(i): {"logprob": float(values_LV[t, i]), "rank": 1, "decoded_token": None}} if t else None
            for t, i in enumerate(ids)
        ]

    def _sglang(self, body: Json) -> Json:
        if not body["return_logprob"] or body["sampling_params"]["max_new_tokens"] != 0:
            raise ValueError(f"cannot be answered: {sorted(body)}")
        ids, first = body["input_ids"], body["logprob_start_len"]
        if len(ids) >= self.max_req_input_len:
            raise ValueError(f"Input length ({len(ids)} tokens) exceeds the maximum allowed length")
        last = self.model.config.vocab_size - 1
        values_LV = self.logprobs_LV(ids)
        rows = [[float(values_LV[t, i]), 0 if i == last else i, None] for t, i in enumerate(ids)][first:]
        rows[0][0] = None
        meta_info = {"id": "1", "prompt_tokens": len(ids), "completion_tokens": 0, "input_token_logprobs": rows}
        return {"text": "", "output_ids": [], "meta_info": meta_info}


class Handler(BaseHTTPRequestHandler):
    """Answers the requests to one server, its `owner`."""

    owner: ModelServer
    protocol_version = "HTTP/1.1"

    def parse_request(self) -> bool:
        """Close a connection that outlives its server."""
        self.close_connection = self.owner.is_stopped
        return not self.owner.is_stopped and super().parse_request()

    def do_GET(self) -> None:
        if not self._has_key():
            self.send(401, {"error": "Unauthorized"})
        elif self.path == "/health":
            time.sleep(self.owner.health_delay_s)
            self.owner.health_checks += 1
            self.send(200 if self.owner.healthy else 503, {})
        elif self.path == "/v1/models":
            self.send(200, self.owner.models())
        elif self.path == "/server_info" and self.owner.wire_format == "sglang":
            self.send(200, {"max_req_input_len": self.owner.max_req_input_len})
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.owner.requests.append((self.path, body))
        if self.owner.faults:
            self.owner.faults.pop(0)(self)
            return
        if not self._has_key():
            self.send(401, {"error": "Unauthorized"})
            return
        try:
            self.send(200, self.owner.answer(self.path, body))
        except NoSuchRouteError:
            self.send(404, {"detail": "Not Found"})
        except (ValueError, KeyError) as error:
            self.send(400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}})

    def send(self, status: int, answer: Json) -> None:
        data = json.dumps(answer).encode()
        with suppress(ConnectionError):  # a client that cancelled its request
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:  # keeps stderr empty
        pass

    def _has_key(self) -> bool:
        key = self.owner.key
        return key is None or self.headers["Authorization"] == f"Bearer {key}"


def main(folder: str, port: str, wire_format: WireFormat) -> None:
    """For each line on stdin, start a server process, after the end of the one before, and print its process id.

    The processes are forked, so that a restarted server needs not import torch again. At the end of stdin, the last one
    is killed.
    """
    torch.set_num_threads(1)
    server = ModelServer(Path(folder), wire_format, int(port), model=loaded(Path(folder)))
    child: int | None = None
    for _ in sys.stdin:
        if child is not None:
            os.waitpid(child, 0)
        child = os.fork()
        if child == 0:
            with server:
                threading.Event().wait()
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
    if child is not None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])  # type: ignore[arg-type] # one of the wire formats
