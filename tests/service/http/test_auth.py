"""Keys on a real server: every route is tried without a key, and each right opens only its own routes."""

import base64
import json
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from dense_reward.http.app import create_app
from dense_reward.http.auth import OPEN_FOLDERS, OPEN_PATHS
from fastapi import FastAPI
from faulty_engines import Gate, Recorder
from running_service import PATIENCE_S, Served, loading, served, wait_until
from starlette.routing import Mount, Route

SCORER, ADMIN = "key-of-the-rl-job", "key-of-the-operator"
ENTRIES = [
    {"name": "rl-job", "key": SCORER, "max_concurrent": 1},
    {"name": "operator", "key": ADMIN, "rights": ["admin"]},
]
IDS = {"prompt_ids": [1], "response_ids": [[2]]}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


@contextmanager
def guarded(folder: Path, **settings: str | float | Path) -> Iterator[Served]:
    file = folder / "keys.json"
    file.write_text(json.dumps(ENTRIES))
    with served(loading(Recorder()), ready=True, api_keys_file=file, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with guarded(tmp_path_factory.mktemp("keys")) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def paths(app: FastAPI) -> Iterator[str]:
    for route in app.routes:
        if isinstance(route, Mount):
            yield f"{route.path}/some-file"
        else:
            assert isinstance(route, Route)
            yield route.path


def test_a_request_that_is_refused_for_its_key_is_counted_on_its_route(service: Served) -> None:
    for path in ("/score", "/teacher/default/v1/completions", "/nothing"):
        assert service.client.post(path, json={}).status_code == 401
    text = service.client.get("/metrics", headers=bearer(ADMIN)).text
    found = re.findall(r'dense_reward_requests_total{route="([^"]*)",status="401"}', text)
    assert {"/score", "/teacher/{teacher}/v1/completions", "unknown"} <= set(found)


def test_every_route_but_the_open_ones_asks_for_a_key(service: Served) -> None:
    tried = set(paths(create_app(service.service)))
    assert {"/score", "/heatmap", "/models", "/metrics", "/docs", "/openapi.json", "/docs/assets/some-file"} < tried
    for path in sorted({*tried, "/nothing", "/score/", "/health/", "/admin", "/web"}):
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDERS) or path == "/teacher/{teacher}/health"
        for method in METHODS:
            answer = service.client.request(method, path)
            assert (answer.status_code == 401) is not is_open, (method, path)


@pytest.mark.parametrize("path", ["/web/../score", "/web/%2e%2e/score", "//score", "/web//../../score", "/./score"])
def test_no_spelling_of_a_path_leads_around_the_guard(service: Served, path: str) -> None:
    url = service.client.base_url.copy_with(raw_path=path.encode())
    request = httpx2.Request("POST", url, json=IDS)
    request.url = url
    assert service.client.send(request).status_code in {401, 404, 405}


def test_a_key_opens_the_routes_of_its_rights_alone(service: Served) -> None:
    def status(key: str, path: str) -> int:
        return service.client.request("GET", path, headers=bearer(key)).status_code

    assert service.client.post("/score", json=IDS, headers=bearer(SCORER)).status_code == 200
    refused = service.client.post("/score", json=IDS, headers=bearer(ADMIN))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert "key operator has no right to score" in refused.json()["error"]["message"]
    assert (status(SCORER, "/admin/models"), status(SCORER, "/models"), status(ADMIN, "/models")) == (403, 200, 403)
    assert (status(SCORER, "/metrics"), status(ADMIN, "/metrics")) == (200, 200)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        f"bearer {SCORER}x",
        f"Token {SCORER}",
        SCORER,
        "Basic !!!",
        "Basic " + base64.b64encode(SCORER.encode()).decode(),
        "Basic " + base64.b64encode(b"\xff:\xff").decode(),
    ],
)
def test_anything_but_a_known_key_is_refused_with_the_cure(service: Served, header: str) -> None:
    answer = service.client.get("/models", headers={"Authorization": header})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == 'Bearer realm="dense-reward"'
    assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"]
    assert SCORER not in answer.text


def test_a_client_whose_contract_has_no_key_puts_it_into_its_url(service: Served) -> None:
    url = service.client.base_url.copy_with(username="openrlhf", password=SCORER, path="/score")
    assert httpx2.post(url, json=IDS, trust_env=False).status_code == 200


def test_the_page_and_the_documentation_open_without_a_key(service: Served) -> None:
    for path in ("/", "/web/page.js", "/web/palettes.css", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json"):
        assert service.client.get(path).status_code == 200, path


def test_a_browser_that_opens_an_address_is_asked_for_the_key(service: Served) -> None:
    answer = service.client.get("/metrics", headers={"Accept": "text/html,*/*"})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic realm=")


def test_metrics_are_open_where_the_setting_says_so(tmp_path: Path) -> None:
    with guarded(tmp_path, open_metrics=True) as running:
        assert running.client.get("/metrics").status_code == 200
        assert running.client.get("/models").status_code == 401


def test_a_key_is_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), guarded(tmp_path) as running:
        for key in (SCORER, ADMIN, "unknown-" + SCORER):
            running.client.post("/score", json=IDS, headers=bearer(key))
        (tmp_path / "keys.json").write_text("[" + SCORER)
        running.client.post("/score", json=IDS, headers=bearer(SCORER))
    assert "--api-keys-file" in caplog.text
    assert SCORER not in caplog.text
    assert ADMIN not in caplog.text


def test_a_key_has_as_many_requests_at_once_as_its_entry_says(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(json.dumps(ENTRIES))
    gate = Gate()
    with (
        served(loading(Recorder(gate)), api_keys_file=tmp_path / "keys.json") as running,
        ThreadPoolExecutor(1) as pool,
    ):
        running.client.headers.update(bearer(SCORER))
        first = pool.submit(running.score, IDS)
        wait_until(gate.entered.is_set)
        refused = running.score(IDS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
        assert int(refused.headers["retry-after"]) >= 1
        gate.opened.set()
        assert first.result(PATIENCE_S).status_code == 200
        assert running.score(IDS).status_code == 200
