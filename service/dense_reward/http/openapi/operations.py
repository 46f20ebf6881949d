"""Every route: its name, who may call it, what it answers, and the errors that it gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from dense_reward.http.openapi.answers import (
    AdminModelsAnswer,
    HealthAnswer,
    ModelsAnswer,
    ReadyAnswer,
    RemovedAnswer,
    ScoreAnswer,
)
from dense_reward.http.openapi.contracts import (
    CompletionAnswer,
    GenerateAnswer,
    GetRewardAnswer,
    SglangAnswer,
    TeachersAnswer,
)
from dense_reward.schemas import ModelCard

Need = Literal["score", "admin", "any key"]
Content = Mapping[str, object]
"""The type of each media type; `str` for those that are not JSON."""
JSON, HTML, TEXT, SVG = "application/json", "text/html", "text/plain", "image/svg+xml"
TAGS = {
    "scoring": "Rewards of tokens.",
    "OpenRLHF": "Rewards in the contract of OpenRLHF's remote reward model.",
    "teacher": "Log-probs for distillation, in the contracts of vLLM and SGLang.",
    "operation": "What monitors and clients ask of the service.",
    "admin": "Pairs are loaded and removed while the service runs. Needs a key with the right admin.",
    "page": "The page, and this documentation.",
}

NOT_READY = frozenset({"starting", "draining"})
BODY = frozenset(
    {
        *("invalid_json", "invalid_unicode", "invalid_encoding", "invalid_request", "too_long"),
        *("body_too_slow", "body_too_large", "unsupported_media_type"),
    }
)
COMPUTED = (
    BODY
    | NOT_READY
    | {
        *("model_not_found", "empty_prompt", "unknown_token_id", "unsupported_by_engine", "queue_full"),
        *("non_finite", "internal", "out_of_memory", "engine_unavailable", "deadline_exceeded"),
    }
)
PINNED = frozenset({"tokenizer_mismatch", "revision_mismatch"})
SCORED = COMPUTED | PINNED | {"wrong_shape", "bad_template", "undecided_template", "repeated_text"}
OF_KEYS = {
    None: frozenset[str](),
    "any key": frozenset({"unauthorized", "rate_limited"}),
    "score": frozenset({"unauthorized", "forbidden", "rate_limited"}),
    "admin": frozenset({"unauthorized", "forbidden", "rate_limited"}),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one route. `codes`: its errors, without those of keys. `computes`: its answer reports its timing.

    `failure`: the content of a 503 that is no error.
    """

    name: str
    tag: str
    summary: str
    answer: Content
    codes: frozenset[str] = frozenset()
    needs: Need | None = None
    computes: bool = False
    failure: Content = field(default_factory=dict)
    description: str | None = None
    """For routes that FastAPI does not list; those that it lists have a docstring."""

    @property
    def all_codes(self) -> frozenset[str]:
        return self.codes | OF_KEYS[self.needs]


def _scoring(name: str, summary: str, answer: Content, codes: frozenset[str]) -> Operation:
    return Operation(name, "scoring", summary, answer, codes, "score", computes=True)


def _teacher(name: str, summary: str, answer: object) -> Operation:
    return Operation(name, "teacher", summary, {JSON: answer}, COMPUTED, "score", computes=True)


def _file(name: str, summary: str, kind: str, description: str) -> Operation:
    return Operation(name, "page", summary, {kind: str}, description=description)


def _files(name: str, folder: str) -> Operation:
    description = f"A script, stylesheet or picture of {folder}. 304 if the caller's copy is current."
    return Operation(
        name, "page", f"A file of {folder}", {"*/*": str}, frozenset({"not_found"}), description=description
    )


_MODELS = frozenset({"model_not_found", "unsupported_by_engine", "engine_unavailable"})
_TEACHERS = {
    ("GET", "/v1/models"): Operation(
        "list_teachers", "teacher", "Teachers", {JSON: TeachersAnswer}, NOT_READY | _MODELS, "score"
    ),
    ("POST", "/v1/completions"): _teacher("completions", "Log-probs, as vLLM's completions", CompletionAnswer),
    ("POST", "/inference/v1/generate"): _teacher("generate", "Log-probs, as vLLM's route for ids", GenerateAnswer),
    ("POST", "/generate"): _teacher(
        "generate_sglang", "Log-probs, as SGLang's generate", SglangAnswer | list[SglangAnswer]
    ),
}
FOLDER = "/teacher/{teacher}"
OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/score"): _scoring("score", "Score responses", {JSON: ScoreAnswer}, SCORED),
    ("POST", "/heatmap"): _scoring(
        "heatmap", "Draw a heatmap", {HTML: str, SVG: str, TEXT: str, JSON: ScoreAnswer}, SCORED
    ),
    ("GET", "/models"): Operation("list_models", "scoring", "Served pairs", {JSON: ModelsAnswer}, NOT_READY, "score"),
    ("POST", "/get_reward"): Operation(
        "get_reward",
        "OpenRLHF",
        "One reward a response, for OpenRLHF",
        {JSON: GetRewardAnswer},
        COMPUTED | PINNED,
        "score",
        computes=True,
    ),
    **_TEACHERS,
    **{
        (method, FOLDER + path): replace(operation, name=f"{operation.name}_of", summary=f"{operation.summary}: by URL")
        for (method, path), operation in _TEACHERS.items()
    },
    ("GET", f"{FOLDER}/health"): Operation(
        "teacher_health", "teacher", "Is the service ready?", {JSON: HealthAnswer}, NOT_READY
    ),
    ("GET", "/health"): Operation(
        "health", "operation", "Does the process work?", {JSON: HealthAnswer}, failure={JSON: HealthAnswer}
    ),
    ("GET", "/ready"): Operation(
        "ready", "operation", "Can it score?", {JSON: ReadyAnswer}, failure={JSON: ReadyAnswer}
    ),
    ("GET", "/metrics"): Operation("metrics", "operation", "Metrics", {TEXT: str}, needs="any key"),
    ("GET", "/admin/models"): Operation(
        "list_loaded", "admin", "Served pairs, and the one being loaded", {JSON: AdminModelsAnswer}, NOT_READY, "admin"
    ),
    ("POST", "/admin/models"): Operation(
        "load_pair",
        "admin",
        "Load a pair",
        {JSON: ModelCard},
        BODY | NOT_READY | {"loading", "load_failed", "internal"},
        "admin",
    ),
    ("DELETE", "/admin/models/{name}"): Operation(
        "remove_pair",
        "admin",
        "Stop serving a pair",
        {JSON: RemovedAnswer},
        NOT_READY | {"model_not_found", "in_use"},
        "admin",
    ),
    ("GET", "/"): _file("page", "The page", HTML, "The page that shows rewards as coloured text."),
    ("GET", "/docs"): _file("documentation", "This documentation", HTML, "Swagger UI with this document."),
    ("GET", "/openapi.json"): Operation(
        "openapi", "page", "This document", {JSON: dict[str, object]}, description="This document."
    ),
    ("GET", "/web/palettes.css"): _file("palettes", "Palettes", "text/css", "The colours of heatmaps, as variables."),
    ("GET", "/web/{file}"): _files("page_file", "the page"),
    ("GET", "/docs/assets/{file}"): _files("documentation_file", "this documentation"),
}
