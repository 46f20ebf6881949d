"""The routes for people and monitors: the page, the docs and their schema, heatmaps, metrics."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator

import httpx2
import pytest
from dense_reward.schemas import HeatmapRequest, ScoreRequest
from dense_reward.teacher.sglang import SglangRequest
from dense_reward.teacher.vllm import CompletionRequest, GenerateRequest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from running_service import Served, served

TEXT = {"prompt": "2+2=", "responses": ["4", "5"]}
OUTSIDE = re.compile(r"""(?:src|href|url)\s*[=(:]\s*["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as running:
        yield running


def directives(answer: httpx2.Response) -> dict[str, list[str]]:
    parts = (part.split() for part in answer.headers["content-security-policy"].split(";"))
    return {name: sources for name, *sources in parts}


def test_the_page_allows_its_own_files_and_nothing_else(service: Served) -> None:
    answer = service.client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = directives(answer)
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == policy["connect-src"] == ["'self'"]
    own, hashed = policy["style-src"]
    assert own == "'self'"
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    assert hashed == f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"
    assert policy["require-trusted-types-for"] == ["'script'"], "no text of a script may become markup or code"
    assert policy["trusted-types"] == ["'none'"]
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert not any("unsafe" in source for sources in policy.values() for source in sources)


def test_every_file_that_the_page_names_is_served_with_its_type(service: Served) -> None:
    names = re.findall(r'(?:src|href)="(web/[^"]+)"', service.client.get("/").text)
    assert names
    for name in names:
        answer = service.client.get(f"/{name}")
        assert answer.status_code == 200
        wanted = {"js": "javascript", "css": "css"}[name.rpartition(".")[2]]
        assert wanted in answer.headers["content-type"]


def test_the_docs_come_whole_from_the_service(service: Served) -> None:
    page = service.client.get("/docs").text
    assert not OUTSIDE.search(page)
    assert "https://" not in page
    files = re.findall(r'(?:src|href)="(/[^"]+)"', page)
    assert len(files) == 4
    for file in files:
        assert service.client.get(file).status_code == 200
    assert service.client.get("/openapi.json").json()["info"]["title"] == "dense-reward"
    assert "validatorUrl" in page, "without it Swagger UI sends the schema to swagger.io"


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield str(value)
            else:
                yield from references(value)
    elif isinstance(node, list):
        for entry in node:
            yield from references(entry)


def test_every_reference_in_the_schema_can_be_followed(service: Served) -> None:
    schema = service.client.get("/openapi.json").json()
    found = set(references(schema))
    assert {"#/components/schemas/ScoreRequest", "#/components/schemas/HeatmapRequest"} <= found
    for reference in found:
        node = schema
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
        assert isinstance(node, dict)


@pytest.mark.parametrize(
    ("route", "model"),
    [
        ("/score", ScoreRequest),
        ("/heatmap", HeatmapRequest),
        ("/v1/completions", CompletionRequest),
        ("/inference/v1/generate", GenerateRequest),
        ("/teacher/{teacher}/generate", SglangRequest),
    ],
)
def test_the_schema_describes_the_bodies_that_are_read(service: Served, route: str, model: type[BaseModel]) -> None:
    schema = service.client.get("/openapi.json").json()
    body = schema["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    described = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert described["properties"].keys() == model.model_fields.keys()
    assert described["additionalProperties"] is False


@pytest.mark.parametrize(
    ("kind", "media_type", "start"),
    [
        ("html", "text/html", "<!DOCTYPE html>"),
        ("svg", "image/svg+xml", "<svg"),
        ("ansi", "text/plain", ""),
        ("json", "application/json", "{"),
    ],
)
def test_a_heatmap_comes_in_the_format_asked_for(service: Served, kind: str, media_type: str, start: str) -> None:
    answer = service.client.post("/heatmap", json=TEXT | {"format": kind})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith(media_type)
    assert answer.text.lower().startswith(start.lower())
    assert answer.headers["x-request-id"]


def test_a_heatmap_escapes_what_its_caller_sent(service: Served) -> None:
    asked = {"prompt": "<script>alert(1)</script>", "response": "<img src=x onerror=alert(2)>"}
    for kind in ("html", "svg"):
        picture = service.client.post("/heatmap", json=asked | {"format": kind}).text
        assert "<script>alert" not in picture
        assert "<img" not in picture


def counted(service: Served) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(service.client.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_requests_tokens_and_batches_are_counted() -> None:
    with served() as fresh:
        for body in (TEXT, TEXT, {"text": ""}, {"prompt_ids": [999], "response_ids": [[1]]}):
            fresh.score(body)
        for path in ("/nothing/here", "/nothing/there", "/web/page.css"):
            fresh.client.get(path)
        numbers = counted(fresh)
    assert numbers["dense_reward_requests_total", "/score", "200"] == 3
    assert numbers["dense_reward_requests_total", "/score", "422"] == 1
    assert numbers["dense_reward_scored_tokens_total", "default"] == 2 * 2 * 2
    assert numbers["dense_reward_batch_tokens_count",] >= 2
    assert (numbers["dense_reward_ready",], numbers["dense_reward_queue_tokens",]) == (1, 0)
    routes = {key[1] for key in numbers if key[0] == "dense_reward_requests_total"}
    assert routes == {"/score", "/ready", "unknown"}, "a label for every path that is tried would fill up Prometheus"


def test_metrics_are_in_prometheus_text_format(service: Served) -> None:
    assert service.client.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_no_answer_ever_names_a_number_that_json_does_not_have(service: Served) -> None:
    body = TEXT | {"include": ["reward", "kl", "centred", "entropy"], "signal": "centred", "top_k": 3}

    def refuse(name: str) -> float:
        raise AssertionError(name)

    json.loads(service.score(body).text, parse_constant=refuse)
