"""Routes, lifespan, and the error -> status table. No logic."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dense_reward.batching.admission import Permit
from dense_reward.batching.worker_threads import WorkerThreads
from dense_reward.errors import RequestError, refuse
from dense_reward.http.auth import Auth
from dense_reward.http.bodies import (
    BodyLimits,
    error_response,
    fault_row,
    fragment,
    inflate,
    is_compressed,
    json_response,
    parse,
    read_body,
)
from dense_reward.http.deadline import deadline
from dense_reward.http.heatmaps import MEDIA_TYPES, draw, with_arrays
from dense_reward.http.keys import Keys
from dense_reward.http.middleware import Identify
from dense_reward.http.pages import add_pages
from dense_reward.schemas import HeatmapRequest, ScoreRequest
from dense_reward.scoring.scorer import Answer, Scorer
from dense_reward.serving.pair_sources import PairSource
from dense_reward.serving.service import Service

BYTES_PER_TOKEN = 4  # of a body, before it is encoded and counted
SMALL_BODY_BYTES = 65_536  # parsed at once: a larger one would hold up every other request
SMALL_ANSWER_TOKENS = 10_000  # scored, each with its alternatives: written at once, for the same reason
BODIES: tuple[type[BaseModel], ...] = (ScoreRequest, HeatmapRequest, PairSource)
Asked = TypeVar("Asked", bound=ScoreRequest)


def create_app(service: Service) -> FastAPI:
    """The HTTP face of one service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(title="dense-reward", lifespan=lifespan, docs_url=None, redoc_url=None)
    settings = service.settings
    keys = None if settings.api_keys_file is None else Keys(settings.api_keys_file)
    app.add_middleware(Auth, keys=keys, open_metrics=settings.open_metrics)
    app.add_middleware(
        Identify, metrics=service.metrics, tracing=service.tracing, is_draining=lambda: service.state == "draining"
    )
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    _add_scoring(app, service)
    _add_operations(app, service)
    _add_admin(app, service)
    add_pages(app)
    setattr(app, "openapi", _openapi(app))  # noqa: B010 - how FastAPI has it changed; mypy knows no other way
    return app


def _add_scoring(app: FastAPI, service: Service) -> None:
    def group(request: Request) -> str | None:
        """Whose work may be shared with this request's; all of it where None."""
        return getattr(request.state, "caller", None) if service.settings.isolate_keys else None

    @app.post("/score", openapi_extra=_body_schema(ScoreRequest))
    async def score(request: Request) -> Response:
        """Token rewards of given responses."""
        async with _admitted(request, service) as (permit, body):
            asked = await _parsed(body, ScoreRequest, service.threads)
            scorer = service.scorer(asked.model)
            answer = await _unless_gone(request, scorer.score(asked, permit, group=group(request)))
            return await _written(request, scorer, asked, answer)

    @app.post("/heatmap", openapi_extra=_body_schema(HeatmapRequest))
    async def heatmap(request: Request) -> Response:
        """The same inputs as a picture: html, svg, ansi, or the json that it is drawn from."""
        async with _admitted(request, service) as (permit, body):
            parsed = await _parsed(body, HeatmapRequest, service.threads)
            scorer = service.scorer(parsed.model)
            asked = with_arrays(parsed, scorer.card.quantities)
            limit = None if asked.format == "json" else service.settings.max_heatmap_tokens
            answer = await _unless_gone(
                request, scorer.score(asked, permit, group=group(request), max_drawn_tokens=limit)
            )
            if asked.format == "json":
                return await _written(request, scorer, asked, answer)
            drawing = partial(draw, asked, answer.rows, scorer.encoder.tokenizer)
            before = time.perf_counter()
            picture = await service.threads.run(drawing)
            response = Response(picture, media_type=MEDIA_TYPES[asked.format])
            return _timed(request, scorer, response, answer, time.perf_counter() - before)


def _add_admin(app: FastAPI, service: Service) -> None:
    @app.get("/admin/models")
    async def models() -> Response:
        """The served pairs, and what is being loaded."""
        cards = [card.model_dump() for card in service.cards()]
        loading = None if service.loading is None else {"name": service.loading, "progress": service.progress}
        return json_response({"models": cards, "loading": loading})

    @app.post("/admin/models", openapi_extra=_body_schema(PairSource))
    async def load(request: Request) -> Response:
        """Load a pair, prove it, and serve it in the place of the pair of its name, if there is one."""
        limits = BodyLimits(service.settings.max_body_bytes, service.settings.max_arrival_s)
        body = await read_body(request, limits, lambda _: None)
        if is_compressed(request):
            body = await service.threads.run(inflate, body, limits.max_bytes)
        source = parse(body, PairSource)
        return json_response((await service.add(source)).model_dump())

    @app.delete("/admin/models/{name}")
    async def remove(name: str) -> Response:
        """Serve a pair no more."""
        service.remove(name)
        return json_response({"removed": name})


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/models")
    async def models() -> Response:
        """The served pairs; 503 where /score answers so."""
        return json_response({"models": [card.model_dump() for card in service.cards()]})

    @app.get("/health")
    async def health() -> Response:
        """200 while the process can ever answer."""
        return json_response({"state": service.state}, 503 if service.state == "failed" else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """200 once all pairs are loaded and proven, and while each can be computed."""
        unavailable_reason = service.unavailable_reason if service.state == "ready" else None
        body: dict[str, str] = {"state": service.state if unavailable_reason is None else "unavailable"}
        if service.settings.api_keys_file is None:  # these name folders and hosts, and this route asks for no key
            body["progress"] = unavailable_reason or service.progress
        return json_response(body, 200 if body["state"] == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        text = service.metrics.render(service.snapshot())
        return Response(text, media_type="text/plain; version=0.0.4")


@asynccontextmanager
async def _admitted(request: Request, service: Service) -> AsyncIterator[tuple[Permit, bytes]]:
    """The body of a request that was let in; its permit is held until its answer is built, or its deadline passed."""
    service.check_ready()
    admission, settings = service.batcher.admission, service.settings
    with admission.permit(0) as permit:

        def hold(size: int) -> None:
            permit.correct(min(size // BYTES_PER_TOKEN, admission.capacity_tokens))

        async with deadline(request, settings.max_request_s) as seconds:
            admission.check_wait(seconds)
            limits = BodyLimits(settings.max_body_bytes, settings.max_arrival_s)
            body = await read_body(request, limits, hold)
            if is_compressed(request):
                body = await service.threads.run(inflate, body, limits.max_bytes)
                hold(len(body))
            yield permit, body


async def _parsed(body: bytes, model: type[Asked], threads: WorkerThreads) -> Asked:
    if len(body) <= SMALL_BODY_BYTES:
        return parse(body, model)
    return await threads.run(parse, body, model)


async def _unless_gone(request: Request, answer: Coroutine[object, object, Answer]) -> Answer:
    """The answer. Raises ClientDisconnect, the work cancelled, where the caller hangs up before."""
    work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    """Returns once the caller is gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _written(request: Request, scorer: Scorer, asked: ScoreRequest, answer: Answer) -> Response:
    def write() -> Response:
        return json_response(_content(request, scorer, answer))

    before = time.perf_counter()
    if answer.scored_tokens * (1 + asked.top_k) <= SMALL_ANSWER_TOKENS:
        response = write()
    else:
        response = await scorer.threads.run(write)
    return _timed(request, scorer, response, answer, time.perf_counter() - before)


def _timed(request: Request, scorer: Scorer, response: Response, answer: Answer, write_s: float) -> Response:
    """Tells where the time went: its caller by the header, traces by the request's state, and the metrics."""
    scorer.metrics.stage("write", write_s)
    stages_s = {name.removesuffix("_s"): seconds for name, seconds in answer.timing_s.items()} | {"write": write_s}
    request.state.stages_s = stages_s
    response.headers["Server-Timing"] = ", ".join(f"{name};dur={1000 * s:.2f}" for name, s in stages_s.items())
    return response


def _content(request: Request, scorer: Scorer, answer: Answer) -> dict[str, object]:
    card = scorer.card
    failed = [(fault.item, fragment({"item": fault.item, "error": fault_row(fault)})) for fault in answer.faults]
    in_order = sorted([*((row["item"], fragment(row)) for row in answer.rows), *failed], key=itemgetter(0))
    named = ("name", "sft", "reference", "tokenizer_sha256", "revision", "related")
    return {
        "id": request.state.request_id,
        "model": {name: getattr(card, name) for name in named},
        "results": [row for _, row in in_order],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "response_tokens": answer.response_tokens,
            "scored_tokens": answer.scored_tokens,
        },
        "timing": answer.timing_s,
    }


async def _on_request_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    return error_response(error, request.state.request_id)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    code, message = {
        404: ("not_found", f"no route {request.url.path}"),
        405: ("method_not_allowed", f"{request.method} is not for {request.url.path}"),
    }.get(status, ("internal", "the request could not be answered"))
    response = error_response(refuse(code, message), request.state.request_id)
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _body_schema(model: type[BaseModel]) -> dict[str, object]:
    """Names the request's schema for /docs: the body is read by hand, in one pass, so FastAPI does not see it."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _openapi(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """FastAPI's description with the schemas of the bodies added."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        described = generate()
        _, schemas = models_json_schema(
            [(model, "validation") for model in BODIES], ref_template="#/components/schemas/{model}"
        )
        described.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return described

    return openapi
