"""Records the examples of the OpenAPI document: real answers of real services.

Scores are those of a tiny pair. An error that a request alone cannot bring about, such as that of a full queue, has a
service of its own.
"""

import base64
import binascii
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
from dense_reward.http.openapi.examples import Example
from dense_reward.http.openapi.operations import JSON
from dense_reward.records import OnDevice, Trunk
from dense_reward.serving.loaders import LoadedPair, LoadPair, loader
from dense_reward.settings import Settings
from example_requests import IDS, REQUESTS, SHOWN
from faulty_engines import INFO, Gate, Recorder, SmallDevice
from running_service import PATIENCE_S, Served, loading, served, wait_until
from served_pair import write_pair

KEY, SCORE_KEY = "a-key-of-the-operator", "a-key-that-only-scores"
ENTRIES = [
    {"name": "operator", "key": KEY, "rights": ["score", "admin"]},
    {"name": "rl-job", "key": SCORE_KEY, "requests_per_minute": 1},
]
NAME = "example"
"""The request id of all examples."""
SLOW_S = 0.2
VOLATILE = {"timing", "created", "revision", "tokenizer_sha256", "message"}
"""What depends on time, or on versions of libraries; messages name the two hashes."""


def recorded(folder: Path) -> Iterator[Example]:
    """Every example with its answer. `folder` must be empty."""
    write_pair(folder)
    (folder / "keys.json").write_text(json.dumps(ENTRIES))
    with tiny_pair(folder) as running:
        for asked in REQUESTS:
            yield answered(asked, sent(running, asked, folder), folder)
    for code, (summary, bring_about) in SPECIAL.items():
        answer = bring_about(folder)
        asked = Example(code, summary, answer.request.method, answer.request.url.path, 0, None)
        yield answered(asked, answer, folder)


@contextmanager
def tiny_pair(folder: Path) -> Iterator[Served]:
    """A service with keys and a tiny pair; the client has all rights."""
    with serving(folder, loader("torch")) as running:
        yield running


@contextmanager
def serving(folder: Path, load: LoadPair) -> Iterator[Served]:
    with served(
        load,
        sft=folder / "sft",
        reference=folder / "reference",
        checkpoints_folder=folder,
        api_keys_file=folder / "keys.json",
        device="cpu",
        dtype="float32",
    ) as running:
        running.client.headers |= {"Authorization": f"Bearer {KEY}", "X-Request-Id": NAME}
        yield running


def sent(running: Served, asked: Example, folder: Path) -> httpx2.Response:
    """The answer to the request of an example."""
    path = asked.path.format(**asked.parameters)
    if asked.request is None:
        return running.client.request(asked.method, path)
    text = asked.request if isinstance(asked.request, str) else json.dumps(asked.request)
    headers = {"Content-Type": JSON, **asked.headers}
    return running.client.request(asked.method, path, content=text.replace(SHOWN, str(folder)), headers=headers)


def answered(asked: Example, answer: httpx2.Response, folder: Path) -> Example:
    """The example with its status and answer; without the name of the folder."""
    text = answer.text.replace(str(folder), SHOWN)
    return replace(asked, status=answer.status_code, answer=json.loads(text) if asked.media_type == JSON else text)


def assert_alike(now: object, shown: object, place: str) -> None:
    """Fails if two answers differ in more than what differs from run to run."""
    match now, shown:
        case dict(), dict():
            assert now.keys() == shown.keys(), place
            for key in now.keys() - VOLATILE:
                assert_alike(now[key], shown[key], f"{place}.{key}")
        case list(), list():
            assert len(now) == len(shown), place
            for at, (one, other) in enumerate(zip(now, shown, strict=True)):
                assert_alike(one, other, f"{place}[{at}]")
        case float(), float():
            assert now == pytest.approx(shown, abs=1e-3), place
        case str(), str() if now != shown:
            np.testing.assert_allclose(floats(now), floats(shown), atol=1e-3, err_msg=place)
        case _:
            assert now == shown, place


def floats(text: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The numbers of a base64 array; fails for any other text."""
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    except binascii.Error:
        raise AssertionError(f"{text!r} is not what the document shows") from None


def unauthorized(folder: Path) -> httpx2.Response:
    with tiny_pair(folder) as running:
        del running.client.headers["Authorization"]
        return running.client.get("/models")


def forbidden(folder: Path) -> httpx2.Response:
    with tiny_pair(folder) as running:
        return running.client.get("/admin/models", headers={"Authorization": f"Bearer {SCORE_KEY}"})


def rate_limited(folder: Path) -> httpx2.Response:
    with tiny_pair(folder) as running:
        running.client.headers["Authorization"] = f"Bearer {SCORE_KEY}"
        return [running.client.get("/models") for _ in range(2)][-1]


def loading_another(folder: Path) -> httpx2.Response:
    gate, load_now = Gate(), loader("torch")

    def load(settings: Settings, report: Callable[[str], None], on_device: OnDevice) -> LoadedPair:
        if settings.name == "early":
            gate(())
        return load_now(settings, report, on_device)

    source = {"name": "early", "sft": str(folder / "sft"), "reference": str(folder / "early")}
    with serving(folder, load) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.client.post, "/admin/models", json=source)
        wait_until(gate.entered.is_set)
        answer = running.client.post("/admin/models", json=source | {"name": "late"})
        gate.opened.set()
        first.result(PATIENCE_S)
        return answer


def body_too_slow(_: Path) -> httpx2.Response:
    def slowly() -> Iterator[bytes]:
        yield b"{"
        time.sleep(3 * SLOW_S)
        yield b"}"

    with served(max_arrival_s=SLOW_S) as running:
        headers = {"Content-Type": JSON, "X-Request-Id": NAME}
        return running.client.post("/score", content=slowly(), headers=headers)


def body_too_large(_: Path) -> httpx2.Response:
    with served(max_body_bytes=1000) as running:
        return scored(running, {"text": "a" * 1000})


def queue_full(_: Path) -> httpx2.Response:
    return while_one_is_computed({}, max_queue_tokens=9)


def deadline_exceeded(_: Path) -> httpx2.Response:
    return while_one_is_computed({"X-Request-Timeout": "0.05"})


def while_one_is_computed(headers: dict[str, str], max_queue_tokens: int = 1000) -> httpx2.Response:
    gate = Gate()
    with served(loading(Recorder(gate)), max_queue_tokens=max_queue_tokens) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.score, IDS)
        wait_until(gate.entered.is_set)
        other = {**IDS, "prompt_ids": [1, 2]}
        answer = running.client.post("/score", json=other, headers={"X-Request-Id": NAME, **headers})
        gate.opened.set()
        first.result(PATIENCE_S)
        return answer


def unsupported_by_engine(_: Path) -> httpx2.Response:
    engine = Recorder(info=replace(INFO, quantities=frozenset()))
    with served(loading(engine)) as running:
        return scored(running, IDS | {"include": ["entropy"]})


def internal(_: Path) -> httpx2.Response:
    def fail(_: Sequence[Trunk]) -> None:
        raise RuntimeError("a bug of the engine")

    with served(loading(Recorder(fail))) as running:
        return scored(running)


def out_of_memory(_: Path) -> httpx2.Response:
    with served(loading(SmallDevice(1))) as running:
        return scored(running)


def starting(_: Path) -> httpx2.Response:
    gate = Gate()

    def load(settings: Settings, report: Callable[[str], None], on_device: OnDevice) -> LoadedPair:
        gate(())
        return loading(Recorder())(settings, report, on_device)

    with served(load, ready=False) as running:
        answer = scored(running)
        gate.opened.set()
        return answer


def draining(_: Path) -> httpx2.Response:
    with served() as running:
        running.service.drain()
        return scored(running)


def scored(running: Served, body: object = IDS) -> httpx2.Response:
    return running.client.post("/score", json=body, headers={"X-Request-Id": NAME})


SPECIAL: dict[str, tuple[str, Callable[[Path], httpx2.Response]]] = {
    "unauthorized": ("No key", unauthorized),
    "forbidden": ("A key without the right", forbidden),
    "body_too_slow": ("A body that does not arrive", body_too_slow),
    "loading": ("Another pair is being loaded", loading_another),
    "body_too_large": ("A body over the limit", body_too_large),
    "unsupported_by_engine": ("An array that the engine cannot compute", unsupported_by_engine),
    "queue_full": ("More requests than can wait", queue_full),
    "rate_limited": ("More requests than a key may send", rate_limited),
    "internal": ("A bug: the log has the traceback", internal),
    "out_of_memory": ("A sequence that does not fit", out_of_memory),
    "starting": ("The pairs are being loaded", starting),
    "draining": ("The service stops", draining),
    "deadline_exceeded": ("The caller's time is up", deadline_exceeded),
}
