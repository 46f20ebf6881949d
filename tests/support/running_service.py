"""The real app on a real server in a thread, with the engine that a test gives it.

The server is not in the main thread, so it installs no signal handlers in pytest's process.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2
import uvicorn
from dense_reward.engines.fake import FakeEngine, FakeTeacher, FakeTokenizer
from dense_reward.http.app import create_app
from dense_reward.http.server import Server, connection
from dense_reward.records import Engine, OnDevice
from dense_reward.serving.loaders import LoadedPair, LoadPair
from dense_reward.serving.service import Service
from dense_reward.settings import Settings
from dense_reward.text.encode import Encoder
from described_answers import hold

PATIENCE_S = 120.0
TOKENIZER_SHA256 = "fake"


@dataclass(frozen=True, slots=True)
class Served:
    """A running service and a client of it. `failures` gets an entry each time the service calls `on_failure`.

    The client holds every answer to the OpenAPI document.
    """

    service: Service
    client: httpx2.Client
    failures: list[None]

    def score(self, body: object) -> httpx2.Response:
        return self.client.post("/score", json=body)


def loading(engine: Engine) -> LoadPair:
    """A load function that returns this engine immediately. The fake engine can be a teacher."""
    taught_by = partial(FakeTeacher, engine) if isinstance(engine, FakeEngine) else None

    def load(_: Settings, report: Callable[[str], None], __: OnDevice) -> LoadedPair:
        report("loading")
        encoder = Encoder.of(FakeTokenizer(), "plain")
        return LoadedPair(engine, encoder, TOKENIZER_SHA256, taught_by=taught_by)

    return load


@contextmanager
def served(load: LoadPair | None = None, *, ready: bool = True, **settings: str | float | Path) -> Iterator[Served]:
    """A service on a free port. If `ready`, waits until it can score."""
    failures: list[None] = []
    service = Service(Settings.model_validate(settings), load or loading(FakeEngine()), lambda: failures.append(None))
    drain_s = service.settings.drain_s
    config = uvicorn.Config(
        create_app(service),
        port=0,
        http=connection(service.settings.max_arrival_s),
        log_config=None,
        ws="none",
        timeout_graceful_shutdown=drain_s,
    )
    server = Server(config, service.drain)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        address, hooks = f"http://127.0.0.1:{port}", {"response": [hold]}
        with httpx2.Client(base_url=address, timeout=PATIENCE_S, trust_env=False, event_hooks=hooks) as client:
            running = Served(service, client, failures)
            if ready:
                wait_until_ready(running)
            yield running
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not stop"


def wait_until_ready(running: Served, patience_s: float = PATIENCE_S) -> None:
    """Fails with the reason if the service fails, or if it is not ready in time."""
    wait_until(lambda: bool(running.failures) or running.client.get("/ready").status_code == 200, patience_s)
    assert not running.failures, running.service.progress


def wait_until(reached: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Fails if `reached` stays false for `patience_s`."""
    end = time.monotonic() + patience_s
    while not reached():
        assert time.monotonic() < end, "the condition was not reached in time"
        time.sleep(0.01)
