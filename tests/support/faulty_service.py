"""A real HTTP server with the service's contract and made-up rewards, which misbehaves on request."""

import base64
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

import numpy as np
from dense_reward.client.responses import WIRE_DTYPES
from dense_reward.schemas import HeatmapRequest, Item, ModelCard, ScoreRequest
from pydantic import ValidationError

Trick = Callable[["Handler"], None]
Row = dict[str, object]

CARD = ModelCard(
    name="made-up",
    sft="sft",
    reference="half",
    revision="r1",
    tokenizer_sha256="0" * 64,
    renderer="plain",
    end_of_turn_id=None,
    dtype="float32",
    device="none",
    vocabulary=1000,
    max_length_tokens=1000,
    quantities=["kl"],
    related=True,
)


def made_up_reward(ids: Sequence[int]) -> list[float]:
    """The reward of each id, exact in float32."""
    return [(i * 37 % 101 - 50) / 8 for i in ids]


def scored_ids(item: Item) -> list[list[int]]:
    """The scored ids of each response; the ids of a text are its bytes."""
    if item.response_ids is not None:
        return item.response_ids
    if item.token_ids is not None and item.score_mask is not None:
        return [[i for i, scored in zip(item.token_ids, item.score_mask, strict=True) if scored]]
    last = item.messages[-1].content if item.messages else None
    texts = item.responses or [item.response or item.text or (last if isinstance(last, str) else "")]
    return [list(text.encode()) for text in texts]


def rows_of(index: int, item: Item, request: ScoreRequest) -> list[Row]:
    rows: list[Row] = []
    for g, ids in enumerate(scored_ids(item)):
        reward = made_up_reward(ids)
        arrays: dict[str, object] = {"token_ids": ids, "reward": reward, "kl": [0.5] * len(ids)}
        names = [name for name in request.include or ("token_ids", "reward") if name != "candidate_sft_logprob"]
        row: Row = {name: arrays[name] for name in names}
        if item.candidate_ids is not None:
            row["candidate_reward"] = [made_up_reward(candidates) for candidates in item.candidate_ids[g]]
            if "candidate_sft_logprob" in (request.include or ()):
                row["candidate_sft_logprob"] = [made_up_reward(candidates) for candidates in item.candidate_ids[g]]
        if item.segments is not None:
            row["segments"] = [sum(reward[start:end]) for start, end in item.segments[g]]
        total = sum(reward)
        summary = {"sum": total, "mean": total / len(ids) if ids else None, "min": min(reward, default=None)}
        rows.append({"item": index, "response": g, "length": len(ids)} | row | summary)
    return rows


def as_base64(row: Mapping[str, object]) -> Row:
    return {
        name: base64.b64encode(np.array(value, dtype=WIRE_DTYPES[name]).tobytes()).decode()
        if name in WIRE_DTYPES
        else value
        for name, value in row.items()
    }


def answer_to(request: ScoreRequest, card: ModelCard = CARD) -> dict[str, object]:
    """A correct answer. An item with an empty prompt_ids is answered with an error."""
    rows: list[Row] = []
    for index, item in enumerate(request.listed()):
        if item.prompt_ids == []:
            rows.append({"item": index, "error": {"code": "empty_prompt", "message": "empty", "param": "prompt_ids"}})
        else:
            rows.extend(rows_of(index, item, request))
    if request.encoding_format == "base64":
        rows = [as_base64(row) for row in rows]
    model = card.model_dump(include={"name", "sft", "reference", "tokenizer_sha256", "revision", "related"})
    usage = {"prompt_tokens": 1, "response_tokens": 2, "scored_tokens": 2}
    timing = {"encode_s": 0.0, "queue_s": 0.0, "compute_s": 0.1, "describe_s": 0.05, "total_s": 0.15}
    return {"id": "answer-1", "model": model, "results": rows, "usage": usage, "timing": timing}


@dataclass
class FaultyService:
    """Runs in a thread while its context is open. Plays the next trick on a request, or answers it correctly."""

    tricks: deque[Trick] = field(default_factory=deque)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    card: ModelCard = CARD

    def __post_init__(self) -> None:
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.service = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyService":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Server(ThreadingHTTPServer):
    service: FaultyService
    daemon_threads = True
    request_queue_size = 256


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with connections kept alive, like the real service."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 5.0

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        service = self.server.service
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        service.bodies.append(body)
        service.headers.append(dict(self.headers.items()))
        if service.tricks:
            service.tricks.popleft()(self)
        elif self.path == "/score":
            try:
                self.send_json(200, answer_to(ScoreRequest.model_validate_json(body), self.server.service.card))
            except ValidationError as error:
                fault = error.errors(include_url=False, include_input=False)[0]
                refuse(422, "invalid_request", param=".".join(map(str, fault["loc"])))(self)
        elif self.path == "/models":
            self.send_json(200, {"models": [service.card.model_dump() | {"from_the_future": [1]}]})
        elif self.path == "/heatmap":
            request = HeatmapRequest.model_validate_json(body)
            self.send_bytes(200, f"<svg>{request.palette} é</svg>".encode(), {"content-type": "image/svg+xml"})
        elif self.path == "/ready":
            self.send_json(200, {})
        else:
            self.send_bytes(404, b"<h1>who are you?</h1>", {"content-type": "text/html"})

    def send_json(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        self.send_bytes(status, json.dumps(body).encode(), {"content-type": "application/json"} | dict(headers or {}))

    def send_bytes(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Logs nothing."""


def refuse(status: int, code: str, param: str = "prompt", **headers: str) -> Trick:
    """An error in the format of the service."""
    error = {"code": code, "message": f"it is {code}", "param": param, "items": None, "request_id": "req-1"}
    dashed = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.send_json(status, {"error": error}, dashed)


def drop_before_answer(handler: Handler) -> None:
    handler.close_connection = True


def drop_in_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "half an ans')
    handler.close_connection = True


def altered(change: Callable[[dict[str, object], list[Row]], None]) -> Trick:
    """A correct answer, changed before it is sent."""

    def trick(handler: Handler) -> None:
        request = ScoreRequest.model_validate_json(handler.server.service.bodies[-1])
        answer = answer_to(request)
        rows = answer["results"]
        assert isinstance(rows, list)
        change(answer, rows)
        handler.send_json(200, answer)

    return trick
