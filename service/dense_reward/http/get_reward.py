"""POST /get_reward: the contract of OpenRLHF's remote reward model, one number for each response."""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import Field, JsonValue, ValidationError, model_validator
from starlette.datastructures import QueryParams

from dense_reward.cancellation import check_cancelled
from dense_reward.errors import RequestError, refuse
from dense_reward.http.admitted import admitted, group_of, parsed_body, unless_disconnected
from dense_reward.http.bodies import json_response
from dense_reward.http.timing import timed
from dense_reward.limits import MAX_ITEMS
from dense_reward.schemas import ScoreRequest, SignalName, Strictly
from dense_reward.scoring.rows import Row
from dense_reward.scoring.scorer import Scorer
from dense_reward.serving.service import Service
from dense_reward.text.continuation import split_ids

PATH = "/get_reward"
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Aggregate = Literal["sum", "mean", "min"]


class GetRewardRequest(Strictly):
    """The body of POST /get_reward, as OpenRLHF sends it."""

    query: Texts = Field(description="prompt and response, decoded with their special tokens")
    prompts: Texts = Field(description="the prompt of each query, with which it starts")
    labels: list[JsonValue] | None = Field(None, description="not used")

    @model_validator(mode="after")
    def _one_of_each(self) -> "GetRewardRequest":
        lengths = {len(self.query), len(self.prompts), len(self.query if self.labels is None else self.labels)}
        if len(lengths) > 1:
            raise ValueError("query, prompts and labels must have one entry for each response")
        return self


class GetRewardOptions(Strictly):
    """The options of POST /get_reward, in its URL: OpenRLHF sends no others."""

    aggregate: Aggregate = Field("sum", description="what the token rewards of a response become")
    model: str | None = Field(None, description="name of the pair or token head; the first one if left out")
    signal: SignalName = Field("reward", description="per-token values that are aggregated")
    tokenizer_sha256: str | None = Field(None, description="refuse the request (409) if another tokenizer is served")
    expect_revision: str | None = Field(None, description="refuse the request (409) if another revision is served")


def add_get_reward(app: FastAPI, service: Service) -> None:
    """Adds the route to an app."""

    @app.post(PATH, openapi_extra=_described())
    async def get_reward(request: Request) -> Response:
        """One reward for each response, in the contract of OpenRLHF's remote reward model."""
        options = _options(request.query_params)
        async with admitted(request, service) as (permit, body):
            parsed = await parsed_body(body, GetRewardRequest, service)
            scorer = service.scorer(options.model)
            encoding = service.lanes.of(permit.tokens).run(_to_score, parsed, options, scorer)
            scored = await unless_disconnected(request, encoding)
            scoring = scorer.score(scored, permit, group=group_of(request, service))
            answer = await unless_disconnected(request, scoring)
            before = time.perf_counter()
            response = json_response(_answer(answer.rows, options.aggregate))
            return timed(request, scorer, response, answer.timing_s, time.perf_counter() - before)


def _options(given: QueryParams) -> GetRewardOptions:
    if len(given.multi_items()) > len(given):
        raise refuse("invalid_request", "the URL gives one option twice: give each once")
    try:
        return GetRewardOptions.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])[:100]
        known = ", ".join(GetRewardOptions.model_fields)
        raise refuse("invalid_request", f"{name}: {first['msg']} (options of the URL: {known})", param=name) from None


def _to_score(request: GetRewardRequest, options: GetRewardOptions, scorer: Scorer) -> ScoreRequest:
    """Raises RequestError with the first query whose ids are not known."""
    if len(request.query) > scorer.max_items:  # before the texts are tokenised
        message = f"{len(request.query)} queries; the limit is {scorer.max_items} (--max-items): send them in parts"
        raise refuse("too_long", message, param="query")
    encoder, longest = scorer.encoder, scorer.limits.max_length_tokens
    items = []
    for index, (query, prompt) in enumerate(zip(request.query, request.prompts, strict=True)):
        check_cancelled()
        try:
            prompt_P, response_T = split_ids(encoder.tokenizer, query, prompt, longest, [encoder.end_of_turn_id])
        except RequestError as error:
            fault = error.faults[0]
            raise refuse(fault.code, f"query {index}: {fault.message}", param=fault.param, item=index) from None
        items.append({"prompt_ids": prompt_P.tolist(), "response_ids": [response_T.tolist()]})
    passed_on = options.model_dump(exclude={"aggregate"})
    return ScoreRequest.model_validate({"items": items, "include": [], **passed_on})


def _answer(rows: Sequence[Row], aggregate: Aggregate) -> dict[str, object]:
    """Rewards in the order of the queries; logs have what every response has: one without tokens has no mean."""
    empty = next((index for index, row in enumerate(rows) if row["length"] == 0), None)
    if empty is not None and aggregate != "sum":
        raise refuse("invalid_request", f"query {empty}: an empty response has no {aggregate}: aggregate by sum")
    logged = {"sum", "length"} | ({"mean", "min"} if empty is None else set())
    rewards = [row[aggregate] for row in rows]
    logs = {f"dense_reward_{name}": [row[name] for row in rows] for name in sorted(logged)}
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}


def _described() -> dict[str, Any]:
    """Body and options for /docs: the route reads both itself."""
    options = GetRewardOptions.model_json_schema()["properties"]
    body = {"$ref": f"#/components/schemas/{GetRewardRequest.__name__}"}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "parameters": [
            {"name": name, "in": "query", "description": schema.pop("description"), "schema": schema}
            for name, schema in options.items()
        ],
    }
