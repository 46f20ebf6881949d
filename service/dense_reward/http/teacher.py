"""The routes of a teacher for distillation.

Each route exists twice: with the name of the teacher in the body, and below /teacher/NAME, for clients that cannot
choose a name.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Protocol, TypeVar

from fastapi import FastAPI, Request, Response

from dense_reward.errors import refuse
from dense_reward.http.admitted import admitted, group_of, parsed_body, unless_disconnected
from dense_reward.http.bodies import body_schema, json_response
from dense_reward.http.timing import timed
from dense_reward.schemas import ModelCard
from dense_reward.scoring.scorer import Scorer
from dense_reward.serving.service import Service
from dense_reward.teacher.names import chosen_name, names_of, pinned, teacher_name
from dense_reward.teacher.questions import Answered, Question, ask, taught_by
from dense_reward.teacher.sglang import SglangRequest
from dense_reward.teacher.vllm import CompletionRequest, GenerateRequest

FOLDER = "/teacher/"
NAMED = FOLDER + "{teacher}"
COMPLETIONS, GENERATE, SGLANG = "/v1/completions", "/inference/v1/generate", "/generate"
MODELS = "/v1/models"
PATHS = frozenset({COMPLETIONS, GENERATE, SGLANG, MODELS})
IN_PATH = {
    "parameters": [
        {"name": "teacher", "in": "path", "required": True, "schema": {"type": "string"}, "example": "default:tilted=1"}
    ]
}


class AsksTeacher(Protocol):
    """A request of one of the routes."""

    def question(self, scorer: Scorer) -> Question: ...

    def answer(self, answered: Answered) -> bytes: ...


Asks = TypeVar("Asks", CompletionRequest, GenerateRequest, SglangRequest)


def add_teacher(app: FastAPI, service: Service) -> None:
    """Add the routes."""
    for prefix, described in (("", {}), (NAMED, IN_PATH)):
        _add_logprobs(app, service, prefix, described)
        _add_state(app, service, prefix, described)


def _add_logprobs(app: FastAPI, service: Service, prefix: str, described: Mapping[str, object]) -> None:
    @app.post(prefix + COMPLETIONS, openapi_extra={**body_schema(CompletionRequest), **described})
    async def completions(request: Request) -> Response:
        """Log-probs of given ids under a teacher, as vLLM's completions have them in prompt_logprobs."""
        return await _answer(request, service, CompletionRequest)

    @app.post(prefix + GENERATE, openapi_extra={**body_schema(GenerateRequest), **described})
    async def generate(request: Request) -> Response:
        """The same as vLLM's route for ids has them, for one sequence."""
        return await _answer(request, service, GenerateRequest)

    @app.post(prefix + SGLANG, openapi_extra={**body_schema(SglangRequest), **described})
    async def generate_sglang(request: Request) -> Response:
        """The same as SGLang has them in meta_info."""
        return await _answer(request, service, SglangRequest)


def _add_state(app: FastAPI, service: Service, prefix: str, described: Mapping[str, object]) -> None:
    @app.get(prefix + MODELS, openapi_extra=dict(described))
    async def teachers(request: Request) -> Response:
        """The teachers, each first with the revision of its pair; below a name that teacher alone. 503 if not ready."""
        named = request.path_params.get("teacher")
        if named is None:
            found = [(card, name) for card in service.cards() for name in names_of(card.name, card.revision)]
            return _models([(card, name) for card, name in found if service.scorer(card.name).taught_by])
        service.check_ready()
        name = teacher_name(named)
        scorer = service.scorer(name.pair)
        name.check_revision(scorer.card.revision)
        taught_by(scorer)
        return _models([(scorer.card, one) for one in dict.fromkeys((pinned(named, scorer.card.revision), named))])

    if prefix:

        @app.get(prefix + "/health", openapi_extra=dict(described))
        async def health() -> Response:
            """200 once the service is ready, as vLLM's and SGLang's servers answer only then; 503 before."""
            service.check_ready()
            return json_response({"state": service.state})


async def _answer(request: Request, service: Service, model: type[Asks]) -> Response:
    async with admitted(request, service) as (permit, body):
        parsed = await parsed_body(body, model, service)
        named = chosen_name(request.path_params.get("teacher"), getattr(parsed, "model", None))
        name = teacher_name(named)
        scorer = service.scorer(name.pair)
        name.check_revision(scorer.card.revision)
        asking = service.lanes.of(permit.tokens).run(parsed.question, scorer)
        question = await unless_disconnected(request, asking)
        work = ask(scorer, name, question, permit, group_of(request, service))
        taught = await unless_disconnected(request, work)
        pairs = list(zip(question.sequences, taught.scores, strict=True))
        answered = Answered(named or scorer.card.name, request.state.request_id, pairs, partial(_text, scorer))
        before = time.perf_counter()
        content = await service.lanes.of(permit.tokens).run(parsed.answer, answered)
        response = Response(content, media_type="application/json")
        return timed(request, scorer, response, taught.timing_s, time.perf_counter() - before)


def _text(scorer: Scorer, token: int) -> str:
    return "".join(scorer.encoder.tokenizer.pieces([token]))


def _models(teachers: list[tuple[ModelCard, str]]) -> Response:
    if not teachers:
        message = "no served pair can be a teacher: serve one with --engine torch"
        raise refuse("unsupported_by_engine", message)
    entries = [
        {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "dense-reward",
            "root": card.reference if teacher_name(name).tilt == -1 else card.sft,
            "max_model_len": card.max_length_tokens,
        }
        for card, name in teachers
    ]
    return json_response({"object": "list", "data": entries})


def is_teacher(path: str) -> bool:
    """Whether a path is that of a teacher's route."""
    return path in PATHS or path.startswith(FOLDER)
