"""Bodies that would become far more than their bytes: each is refused in words, most before an object is made."""

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from dense_reward.engines.fake import FakeEngine, FakeTokenizer
from dense_reward.http import admitted
from dense_reward.records import OnDevice
from dense_reward.schemas import MAX_CALLS, MAX_MESSAGES, MAX_TOOLS, MAX_VARIABLES
from dense_reward.serving import service as service_module
from dense_reward.serving.loaders import LoadedPair
from dense_reward.settings import Settings
from dense_reward.text.encode import Encoder
from dense_reward.text.tokenizer import Pieces
from running_service import PATIENCE_S, Served, served, wait_until

from bench.hostile.corpus import HostileBody, corpus

pytestmark = pytest.mark.slow

CORPUS = {body.name: body for body in corpus()}
TOO_LARGE = (413, "larger than 4194304 bytes (--max-body-bytes)")
RATIO = "more than 100 times its bytes"
VALUES, CONTAINERS, KEYS = "more than 524288 values", "more than 65536 lists and objects", "more than 1024 keys"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as running:
        yield running


def refusal(running: Served, body: HostileBody) -> tuple[int, str]:
    """The status and the words of the answer."""
    with socket.create_connection((running.client.base_url.host, running.client.base_url.port or 0)) as caller:
        caller.settimeout(PATIENCE_S)
        caller.sendall(body.bytes_of_request())
        answer = b"".join(iter(lambda: caller.recv(65_536), b""))
    return int(answer[9:12]), str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"])


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("2.4 M messages, gzip", *TOO_LARGE),
        ("20 M tools, gzip", 413, "the body"),
        ("4 MB of blanks, gzip", 413, RATIO),
        ("messages to the limit", 422, CONTAINERS),
        ("empty messages", 422, CONTAINERS),
        ("numbers in an unknown key", 422, VALUES),
        ("lists in an unknown key", 422, CONTAINERS),
        ("64 kB of unknown keys", 422, KEYS),
        ("one key many times", 422, KEYS),
        ("tools", 422, CONTAINERS),
        ("one list of ids", 422, VALUES),
        ("responses of one id", 422, CONTAINERS),
        ("candidates", 422, CONTAINERS),
        ("strings", 422, VALUES),
        ("items", 422, CONTAINERS),
        ("parts of a message", 422, CONTAINERS),
        ("lists in lists", 422, CONTAINERS),
    ],
)
def test_nothing_is_made_of_a_body_that_would_become_too_much(
    service: Served, name: str, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admitted, "parse", lambda *_: pytest.fail("the body was parsed"))
    found, message = refusal(service, CORPUS[name])
    assert found == status
    assert words in message
    wait_until(lambda: service.service.batcher.admission.held_tokens == 0)


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("a key of 4 MB", 422, "kkk… (4193"),
        ("model of 4 MB", 404, "there is no model"),
        ("gzip in gzip", 400, "not UTF-8"),
        ("gzip cut off", 413, RATIO),
        ("chunks of one byte", 422, "the limit is"),
    ],
)
def test_an_answer_stays_short_whatever_was_sent(service: Served, name: str, status: int, words: str) -> None:
    found, message = refusal(service, CORPUS[name])
    assert found == status
    assert words in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("body", "param", "most"),
    [
        ({"messages": [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)}, "messages", MAX_MESSAGES),
        ({"messages": [{"role": "user", "tool_calls": [1] * (MAX_CALLS + 1)}]}, "messages.0.tool_calls", MAX_CALLS),
        ({"tools": [{}] * (MAX_TOOLS + 1)}, "tools", MAX_TOOLS),
        ({"template_kwargs": {f"k{n}": 1 for n in range(MAX_VARIABLES)}}, "template_kwargs", MAX_VARIABLES - 1),
    ],
)
def test_the_lists_of_a_chat_are_bounded(service: Served, body: dict[str, object], param: str, most: int) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]} | body
    answer = service.score(chat)
    error = answer.json()["error"]
    if param == "template_kwargs":
        assert "variable" in error["message"] or "place for" in error["message"], "as many as an object may have keys"
        return
    assert (answer.status_code, error["code"]) == (422, "invalid_request")
    assert error["param"].startswith(param)
    assert str(most) in error["message"]


def test_what_a_compressed_body_becomes_is_held_while_it_is_inflated(
    service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    estimate = type(service.service.batcher.admission.permit(0)).estimate

    def recorded(permit: object, tokens: int) -> None:
        held.append(tokens)
        estimate(permit, tokens)  # type: ignore[arg-type] # the class is not public

    monkeypatch.setattr("dense_reward.batching.admission.Permit.estimate", recorded)
    body = gzip.compress(json.dumps({"text": "abc " * 100_000}).encode(), mtime=0)
    answer = service.client.post("/score", content=body, headers=JSON | {"Content-Encoding": "gzip"})
    assert answer.status_code == httpx2.codes.UNPROCESSABLE_CONTENT
    assert held[:3] == [0, len(body) // 4, 0], "first nothing, then what is declared"
    assert len(held) > 6
    assert held[3:] == sorted(held[3:])
    assert held[-1] == len(gzip.decompress(body)) // 4


class Waiting(FakeTokenizer):
    """Holds each thread that tokenises, until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def encode(self, text: str, *, special: bool, continues: bool = False, at_most: int | None = None) -> Pieces:
        self.entered.release()
        assert self.opened.wait(PATIENCE_S)
        return super().encode(text, special=special)


def test_the_service_is_not_ready_while_no_request_can_be_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "STUCK_S", 0.0)
    tokenizer = Waiting()

    def load(_: Settings, __: Callable[[str], None], ___: OnDevice) -> LoadedPair:
        return LoadedPair(FakeEngine(), Encoder.of(tokenizer, "plain"), "waiting")

    with served(load) as running, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(running.score, {"text": "a b"}) for _ in range(2)]
        for _ in answers:
            assert tokenizer.entered.acquire(timeout=PATIENCE_S)
        answer = running.client.get("/ready")
        assert (answer.status_code, answer.json()["state"]) == (503, "unavailable")
        assert "requests cannot be encoded" in answer.json()["progress"]
        assert running.client.get("/health").status_code == httpx2.codes.OK
        tokenizer.opened.set()
        assert all(answer.result(PATIENCE_S).status_code == httpx2.codes.OK for answer in answers)
        wait_until(lambda: running.client.get("/ready").status_code == httpx2.codes.OK)
