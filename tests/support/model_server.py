"""A server of one checkpoint with the wire format of vLLM or SGLang. It computes with plain transformers.

`python model_server.py FOLDER PORT SPEECH` runs it as a process that a test can kill. It misbehaves on request
(`tricks`).
"""

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

Speech = Literal["vllm", "vllm_tokens", "vllm_named", "sglang"]
Json = Mapping[str, Any]
MAX_MODEL_LEN = 96
MAX_LOGPROBS = 20
Trick = Callable[["Handler"], None]


class NoSuchRouteError(Exception):
    """The request gets a 404."""


@dataclass(slots=True)
class ModelServer:
    """A context manager. Each of `tricks` handles one POST instead of the real answer."""

    folder: Path
    speech: Speech = "vllm"
    port: int = 0
    served: str = "tiny"
    key: str | None = None
    healthy: bool = True
    health_s: float = 0.0
    max_model_len: int = MAX_MODEL_LEN
    tricks: list[Trick] = field(default_factory=list)
    asked: list[tuple[str, Json]] = field(default_factory=list)
    looks: int = 0
    model: Any = None
    _seen: set[tuple[int, ...]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, local_files_only=True)
        handler = type("OwnHandler", (Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Answers no more requests, not even on open connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def is_stopped(self) -> bool:
        return self._server is None

    def models(self) -> Json:
        owner = "sglang" if self.speech == "sglang" else "vllm"
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
        """SGLang refuses sequences of this length or longer."""
        return self.max_model_len - 6

    def answer(self, path: str, body: Json) -> Json:
        match self.speech, path:
            case (("vllm" | "vllm_tokens" | "vllm_named"), "/v1/completions"):
                return self._completions(body)
            case (("vllm_tokens" | "vllm_named"), "/inference/v1/generate"):
                return self._tokens(body)
            case "sglang", "/generate":
                return self._sglang(body)
            case _:
                raise NoSuchRouteError

    def logprobs_LV(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Row t is log p(. | ids[:t]), from t = 1 on; row 0 is nan."""
        with self._lock, torch.inference_mode():
            logits_LV = self.model(torch.tensor([list(ids)])).logits[0].float()
            values: NDArray[np.float32] = torch.log_softmax(logits_LV, -1).numpy()
        return np.concatenate([np.full_like(values[:1], np.nan), values[:-1]])

    def _completions(self, body: Json) -> Json:
        if body["model"] != self.served or body["prompt_logprobs"] != 0 or body["max_tokens"] != 1:
            raise ValueError(f"cannot be answered: {sorted(body)}")
        choice = {
            "index": 0,
            "text": "a",
            "finish_reason": "length",
            "prompt_logprobs": self._of_prompt(body["prompt"]),
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": self.served, "choices": [choice]}

    def _tokens(self, body: Json) -> Json:
        parameters, ids = body["sampling_params"], body["token_ids"]
        answer: dict[str, Any] = {"request_id": "1", "choices": [{"index": 0, "token_ids": [1]}]}
        answer |= {"prompt_logprobs": None, "prompt_token_id_logprobs": None}
        named, start = parameters.get("prompt_logprob_token_ids"), parameters.get("prompt_logprob_start")
        if named is None:
            return answer | {"prompt_logprobs": self._of_prompt(ids)}
        if self.speech != "vllm_named":
            raise ValueError("prompt_logprob_token_ids requires the V2 model runner")
        if len(named) != len(ids) - 1 - start or len(named[0]) > MAX_LOGPROBS:
            raise ValueError(f"{len(named)} rows of {len(named[0])}")
        if tuple(ids) in self._seen and not parameters["skip_reading_prefix_cache"]:
            return answer  # like vLLM if a cached prefix covers the first row
        self._seen.add(tuple(ids))
        values_TK = np.take_along_axis(self.logprobs_LV(ids)[start + 1 :], np.array(named), axis=1)
        file = io.BytesIO()
        np.save(file, values_TK)
        return answer | {"prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}

    def _of_prompt(self, ids: Sequence[int]) -> list[Json | None]:
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
        info = {"id": "1", "prompt_tokens": len(ids), "completion_tokens": 0, "input_token_logprobs": rows}
        return {"text": "", "output_ids": [], "meta_info": info}


class Handler(BaseHTTPRequestHandler):
    """Handles the requests of one server, its `owner`."""

    owner: ModelServer
    protocol_version = "HTTP/1.1"

    def parse_request(self) -> bool:
        """Closes the connection if the server was stopped: open connections outlive their server."""
        self.close_connection = self.owner.is_stopped
        return not self.owner.is_stopped and super().parse_request()

    def do_GET(self) -> None:
        if not self._has_key():
            self.send(401, {"error": "Unauthorized"})
        elif self.path == "/health":
            time.sleep(self.owner.health_s)
            self.owner.looks += 1
            self.send(200 if self.owner.healthy else 503, {})
        elif self.path == "/v1/models":
            self.send(200, self.owner.models())
        elif self.path == "/server_info" and self.owner.speech == "sglang":
            self.send(200, {"max_req_input_len": self.owner.max_req_input_len})
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.owner.asked.append((self.path, body))
        if self.owner.tricks:
            self.owner.tricks.pop(0)(self)
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
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:  # writes nothing to stderr
        pass

    def _has_key(self) -> bool:
        key = self.owner.key
        return key is None or self.headers["Authorization"] == f"Bearer {key}"


def main(folder: str, port: str, speech: Speech) -> None:
    torch.set_num_threads(1)
    with ModelServer(Path(folder), speech, int(port)):
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])  # type: ignore[arg-type] # one of the speeches
