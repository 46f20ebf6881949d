"""The ASGI app: its routes, admission of requests, cancellation when a caller disconnects, and answers from errors."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import cache, partial
from operator import itemgetter

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from dense_reward.credentials import without_credentials
from dense_reward.errors import RequestError, refuse
from dense_reward.http.admitted import admitted, group_of, parsed_body, unless_disconnected
from dense_reward.http.auth import Auth
from dense_reward.http.bodies import (
    MAX_NAME,
    BodyLimits,
    body_schema,
    error_response,
    fault_row,
    fragment,
    json_response,
    read_body,
)
from dense_reward.http.get_reward import GetRewardRequest, add_get_reward
from dense_reward.http.heatmaps import MEDIA_TYPES, draw, with_arrays
from dense_reward.http.keys import Keys
from dense_reward.http.middleware import Identify
from dense_reward.http.openapi.document import document
from dense_reward.http.openapi.operations import JSON
from dense_reward.http.pages import add_pages
from dense_reward.http.statuses import PlainStatuses, expected
from dense_reward.http.teacher import add_teacher
from dense_reward.http.timing import timed
from dense_reward.schemas import WIRE_VERSION, HeatmapRequest, ScoreRequest
from dense_reward.scoring.rows import Row
from dense_reward.scoring.scorer import Answer, Scorer
from dense_reward.serving.pair_sources import PairSource
from dense_reward.serving.service import Service
from dense_reward.teacher.sglang import SglangRequest
from dense_reward.teacher.vllm import CompletionRequest, GenerateRequest

# Up to this size an answer is serialised on the event loop: a thread would cost more. A larger one uses a thread,
# because it would block the event loop.
SMALL_ANSWER_TOKENS = 10_000  # scored tokens times (1 + top_k)
DRAWING_TOKENS = 4  # about as much work as to draw one token
BODIES: tuple[type[BaseModel], ...] = (
    ScoreRequest,
    HeatmapRequest,
    GetRewardRequest,
    PairSource,
    CompletionRequest,
    GenerateRequest,
    SglangRequest,
)


def create_app(service: Service, *, loads_first: bool = False) -> FastAPI:
    """The ASGI app of one service. Its lifespan starts and stops the service.

    `loads_first`: the app starts only once all pairs are loaded, or fails to start; for servers that route requests to
    an app as soon as it has started, as Ray Serve does.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            if loads_first:
                await service.loaded()
            yield
        finally:
            await service.stop()

    app = FastAPI(title="dense-reward", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    settings = service.settings
    keys = None if settings.api_keys_file is None else Keys(settings.api_keys_file)
    app.add_middleware(Auth, keys=keys, open_metrics=settings.open_metrics)
    app.add_middleware(PlainStatuses)
    app.add_middleware(
        Identify, metrics=service.metrics, tracing=service.tracing, is_draining=lambda: service.state == "draining"
    )
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    _add_scoring(app, service)
    add_teacher(app, service)
    add_get_reward(app, service)
    _add_operations(app, service)
    _add_admin(app, service)
    add_pages(app)
    _add_document(app, with_keys=keys is not None)
    return app


def _add_scoring(app: FastAPI, service: Service) -> None:
    @app.post("/score", openapi_extra=body_schema(ScoreRequest))
    async def score(request: Request) -> Response:
        """Token rewards of given responses."""
        async with admitted(request, service) as (permit, body):
            parsed = await parsed_body(body, ScoreRequest, service)
            scorer = service.scorer(parsed.model)
            answer = await unless_disconnected(request, scorer.score(parsed, permit, group=group_of(request, service)))
            return await _answer_response(request, scorer, parsed, answer)

    @app.post("/heatmap", openapi_extra=body_schema(HeatmapRequest))
    async def heatmap(request: Request) -> Response:
        """Token rewards as a picture (html, svg or ansi), or as the data of the picture (json)."""
        async with admitted(request, service) as (permit, body):
            parsed = await parsed_body(body, HeatmapRequest, service)
            scorer = service.scorer(parsed.model)
            drawable = with_arrays(parsed, scorer.card.offered)
            limit = None if drawable.format == "json" else service.settings.max_heatmap_tokens
            answer = await unless_disconnected(
                request, scorer.score(drawable, permit, group=group_of(request, service), max_drawn_tokens=limit)
            )
            if drawable.format == "json":
                return await _answer_response(request, scorer, drawable, answer)
            drawing = partial(
                draw, drawable, answer.rows, scorer.encoder.tokenizer, of_head=scorer.card.token_head is not None
            )
            before = time.perf_counter()
            tokens = answer.prompt_tokens + answer.response_tokens
            picture = await service.lanes.of(DRAWING_TOKENS * tokens).run(drawing)
            response = Response(picture, media_type=MEDIA_TYPES[drawable.format])
            return timed(request, scorer, response, answer.timing_s, time.perf_counter() - before)


def _add_admin(app: FastAPI, service: Service) -> None:
    @app.get("/admin/models")
    async def models() -> Response:
        """The served pairs, and the pair that is being loaded."""
        cards = [card.model_dump() for card in service.cards()]
        loading = None if service.loading is None else {"name": service.loading, "progress": service.progress}
        return json_response({"models": cards, "loading": loading})

    @app.post("/admin/models", openapi_extra=body_schema(PairSource))
    async def load(request: Request) -> Response:
        """Load a pair, verify its probes, and serve it. It replaces the pair of the same name, if there is one."""
        limits = BodyLimits(service.settings.max_body_bytes, service.settings.max_arrival_s)
        body = await read_body(request, limits, lambda _: None)  # reserves no queue room: a source is not queued
        source = await parsed_body(body, PairSource, service)
        return json_response((await service.add(source)).model_dump())

    @app.delete("/admin/models/{name}")
    async def remove(name: str) -> Response:
        """Stop serving a pair."""
        service.remove(name)
        return json_response({"removed": name})


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/models")
    async def models() -> Response:
        """The served pairs; 503 if the service is not ready."""
        return json_response({"models": [card.model_dump() for card in service.cards()]})

    @app.get("/health")
    async def health() -> Response:
        """200; 503 if the service has failed. Then only a new process helps."""
        return json_response({"state": service.state}, 503 if service.state == "failed" else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """200 once all pairs are loaded and their probes verified, and while every engine can compute."""
        unavailable_reason = service.unavailable_reason if service.state == "ready" else None
        body: dict[str, str] = {"state": service.state if unavailable_reason is None else "unavailable"}
        if service.settings.api_keys_file is None:  # progress names folders and hosts, and this route needs no key
            body["progress"] = unavailable_reason or service.progress
        return json_response(body, 200 if body["state"] == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        text = service.metrics.render(service.snapshot())
        return Response(text, media_type="text/plain; version=0.0.4")


async def _answer_response(request: Request, scorer: Scorer, scored: ScoreRequest, answer: Answer) -> Response:
    def serialise() -> Response:
        return json_response(_content(request, scorer, answer))

    before = time.perf_counter()
    tokens = answer.scored_tokens * (1 + scored.top_k)
    if tokens <= SMALL_ANSWER_TOKENS:
        response = serialise()
    else:
        response = await scorer.lanes.of(tokens).run(serialise)
    return timed(request, scorer, response, answer.timing_s, time.perf_counter() - before)


def _content(request: Request, scorer: Scorer, answer: Answer) -> dict[str, object]:
    card = scorer.card
    failed = [(fault.item, fragment({"item": fault.item, "error": fault_row(fault)})) for fault in answer.faults]
    in_order = sorted([*((row["item"], fragment(row)) for row in _taken(answer.rows)), *failed], key=itemgetter(0))
    names = ("name", "sft", "reference", "token_head", "tokenizer_sha256", "revision", "related")
    return {
        "wire_version": WIRE_VERSION,
        "id": request.state.request_id,
        "model": {name: getattr(card, name) for name in names},
        "results": [row for _, row in in_order],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "response_tokens": answer.response_tokens,
            "scored_tokens": answer.scored_tokens,
        },
        "timing": answer.timing_s,
    }


def _taken(rows: list[Row]) -> Iterator[Row]:
    """The rows, each of which is freed before the next: to free all objects of an answer in one step holds the GIL."""
    rows.reverse()
    while rows:
        yield rows.pop()


async def _on_request_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    return error_response(error, request.state.request_id)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    code, message = {
        404: ("not_found", f"there is no route {without_credentials(request.url.path)[:MAX_NAME]}"),
        405: (
            "method_not_allowed",
            f"{without_credentials(request.url.path)[:MAX_NAME]} does not allow {request.method}",
        ),
    }.get(status, ("internal", "the request could not be answered"))
    response = error_response(refuse(code, message), request.state.request_id)
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _add_document(app: FastAPI, *, with_keys: bool) -> None:
    generate = app.openapi
    openapi = cache(lambda: document(generate(), BODIES, expected, with_keys=with_keys))
    setattr(app, "openapi", openapi)  # noqa: B010 - FastAPI's way to extend the schema; mypy refuses app.openapi =
    written = cache(lambda: json_response(app.openapi()).body)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_json() -> Response:
        # On a thread: the first time, it takes a few tenths of a second.
        return Response(await run_in_threadpool(written), media_type=JSON)
