"""The life of a service over HTTP: start, failures, a full queue, callers that disconnect, broken engines, stop."""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import httpx2
import numpy as np
import pytest
from dense_reward.engines.fake import FakeEngine, FakeTokenizer
from dense_reward.errors import CheckpointError, EngineLostError, OutOfMemoryError, RequestError
from dense_reward.records import Cost, EngineInfo, OnDevice, TokenScores, Trunk, Wants, Work
from dense_reward.schemas import ScoreRequest
from dense_reward.serving.loaders import LoadedPair
from dense_reward.serving.service import Service
from dense_reward.settings import Settings, read_settings
from dense_reward.telemetry.logs import TextLines
from dense_reward.text.encode import Encoder
from faulty_engines import INFO, Gate, Recorder, packed
from running_service import PATIENCE_S, Served, loading, served, wait_until

pytestmark = pytest.mark.slow

Report = Callable[[str], None]
IDS = {"prompt_ids": [1, 2], "response_ids": [[3, 4], [5]]}


def error_of(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@dataclass(frozen=True, slots=True)
class GatedLoad:
    """A load that waits for the test's gate after its first step, and raises `failure` if there is one."""

    gate: Gate
    failure: Exception | None = None

    def __call__(self, settings: Settings, report: Report, on_device: OnDevice) -> LoadedPair:
        report("verifying the files")
        self.gate(())
        report("verifying the probe")
        if self.failure is not None:
            raise self.failure
        return loading(FakeEngine())(settings, report, on_device)


def test_a_service_reports_that_it_starts_and_then_scores() -> None:
    gate = Gate()
    with served(GatedLoad(gate), ready=False) as running:
        wait_until(gate.entered.is_set)
        assert running.client.get("/health").status_code == 200
        ready = running.client.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"state": "starting", "progress": "verifying the files"})
        refused = running.score(IDS)
        assert error_of(refused) == (503, "starting")
        assert int(refused.headers["retry-after"]) >= 1
        assert error_of(running.client.get("/models")) == (503, "starting")
        assert "dense_reward_ready 0.0" in running.client.get("/metrics").text
        gate.opened.set()
        wait_until(lambda: running.client.get("/ready").status_code == 200)
        assert running.score(IDS).status_code == 200


@pytest.mark.parametrize("failure", [CheckpointError("the weights changed"), ValueError("unforeseen")])
def test_a_service_whose_pair_cannot_be_served_fails_and_asks_to_be_ended(failure: Exception) -> None:
    gate = Gate()
    gate.opened.set()
    with served(GatedLoad(gate, failure), ready=False) as running:
        wait_until(lambda: bool(running.failures))
        assert running.client.get("/health").status_code == 503
        ready = running.client.get("/ready")
        assert ready.json()["state"] == "failed"
        assert str(failure) in ready.json()["progress"]
        assert running.score(IDS).status_code == 503
    assert running.service.state == "failed", "stopping must not hide that it failed"
    assert running.failures == [None]


def test_the_reason_of_a_failed_start_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    gate.opened.set()
    with served(GatedLoad(gate, CheckpointError("the weights changed")), ready=False) as running:
        wait_until(lambda: bool(running.failures))
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "the weights changed"
    assert record.exc_info is None


def test_a_service_that_is_stopped_while_it_loads_ends_at_the_next_step() -> None:
    gate = Gate()

    async def live() -> Service:
        service = Service(read_settings({}, ()), GatedLoad(gate), lambda: None)
        service.start()
        assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0)
        assert service.state == "draining"
        gate.opened.set()
        await asyncio.wait_for(stopping, PATIENCE_S)
        return service

    service = asyncio.run(live())
    assert service.state == "draining"
    assert service.progress == "verifying the files"


def test_a_full_queue_answers_429_with_the_time_of_a_retry() -> None:
    gate = Gate()
    body = {"prompt_ids": [1] * 50, "response_ids": [[2] * 20, [3] * 20]}
    with served(loading(Recorder(gate)), max_queue_tokens=90) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.score, body)
        wait_until(gate.entered.is_set)
        refused = running.score(body)
        assert error_of(refused) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert "--max-queue-tokens" in refused.json()["error"]["message"]
        assert "dense_reward_queue_tokens 90.0" in running.client.get("/metrics").text
        gate.opened.set()
        assert first.result(PATIENCE_S).status_code == 200
        assert running.score(body).status_code == 200
        assert running.service.batcher.admission.held_tokens == 0


def test_what_never_fits_into_the_queue_is_refused_for_good() -> None:
    body = {"prompt_ids": [1] * 50, "response_ids": [[2] * 51]}
    with served(max_queue_tokens=100) as running:
        refused = running.score(body)
        assert error_of(refused) == (422, "too_long")
        assert "101 tokens, the queue holds 100 (--max-queue-tokens)" in refused.json()["error"]["message"]
        assert running.service.batcher.admission.held_tokens == 0
        fits = {"prompt_ids": [1] * 50, "response_ids": [[2] * 50]}
        padded = httpx2.Request("POST", "/", json=fits).content.ljust(5000)
        answer = running.client.post("/score", content=padded, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, "bytes are an estimate; the count decides"


def test_callers_that_disconnect_leave_the_queue() -> None:
    gate = Gate()
    engine = Recorder(gate)
    with served(loading(engine), max_batch_tokens=10) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.score, IDS)
        wait_until(gate.entered.is_set)
        with pytest.raises(httpx2.ReadTimeout):
            running.client.post("/score", json={"prompt_ids": [7], "response_ids": [[7] * 8] * 30}, timeout=0.3)
        wait_until(lambda: running.service.batcher.admission.held_tokens == 5)
        gate.opened.set()
        assert first.result(PATIENCE_S).status_code == 200
        assert running.score(IDS).status_code == 200
        wait_until(lambda: '"/score",status="499"' in running.client.get("/metrics").text)
    assert not any(trunk.prompt_P[0] == 7 for batch in engine.batches for trunk in batch)


def test_a_caller_that_disconnects_within_its_body_causes_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with served() as running:
        host, port = running.client.base_url.host, running.client.base_url.port
        assert port is not None
        with socket.create_connection((host, port)) as line:
            head = (
                f"POST /score HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
            )
            line.sendall(head.encode() + b'{"text"')
        wait_until(lambda: '"/score",status="499"' in running.client.get("/metrics").text)
        assert running.score(IDS).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@dataclass(frozen=True, slots=True)
class Spoiling:
    """The fake engine, with `value` as the first number of `field` in branches that contain id 66."""

    value: float
    field: str = "sft_logprob_S"

    @property
    def info(self) -> EngineInfo:
        return FakeEngine().info

    def cost(self, trunk: Trunk) -> Cost:
        return packed(trunk)

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        return lambda: [
            [
                self._spoiled(scores) if 66 in branch.ids_T else scores
                for branch, scores in zip(trunk.branches, row, strict=True)
            ]
            for trunk, row in zip(trunks, FakeEngine().score(trunks, wants), strict=True)
        ]

    def _spoiled(self, scores: TokenScores) -> TokenScores:
        array = np.array(getattr(scores, self.field))
        array[0] = self.value
        return replace(scores, **{self.field: array})  # type: ignore[arg-type] # the field is an array


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["sft_logprob_S", "reference_logprob_S", "kl_S", "top_sft_logprob_SK"])
def test_a_number_that_is_none_is_a_failure_and_never_an_answer(value: float, field: str) -> None:
    with served(loading(Spoiling(value, field))) as running:
        options = {"signal": "centred", "top_k": 2}
        answer = running.score({"prompt_ids": [1], "response_ids": [[66]], **options})
        assert error_of(answer) == (500, "non_finite")
        assert "--dtype float32" in answer.json()["error"]["message"]
        good = {"prompt_ids": [1], "response_ids": [[2]]}
        items = {"items": [good, {"prompt_ids": [1], "response_ids": [[3], [66]]}, good], **options}
        refused = running.score(items)
        assert error_of(refused) == (500, "non_finite")
        assert [fault["item"] for fault in refused.json()["error"]["items"]] == [1]
        rows = running.score(items | {"on_error": "per_item"}).json()["results"]
        assert [(row["item"], "error" in row) for row in rows] == [(0, False), (1, True), (2, False)]


class SecretError(Exception):
    pass


def test_an_internal_error_is_logged_and_hidden_from_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    def before(_: Sequence[Trunk]) -> None:
        raise SecretError("password at /etc/secret")

    caplog.handler.setFormatter(TextLines())
    with served(loading(Recorder(before))) as running:
        answer = running.client.post("/score", json=IDS, headers={"X-Request-Id": "find-me"})
        assert error_of(answer) == (500, "internal")
        assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"] == "find-me"
        assert "secret" not in answer.text.lower()
        assert 'dense_reward_requests_total{route="/score",status="500"} 1.0' in running.client.get("/metrics").text
        assert running.service.batcher.admission.held_tokens == 0
    (line,) = [line for line in caplog.text.splitlines() if " ERROR " in line]
    assert line.endswith("a request failed [find-me]")
    assert "password at /etc/secret" in caplog.text


def test_a_sequence_that_does_not_fit_into_memory_is_refused() -> None:
    def before(trunks: Sequence[Trunk]) -> None:
        if sum(trunk.tokens for trunk in trunks) > 10:
            raise OutOfMemoryError("tried to allocate 2 GiB")

    with served(loading(Recorder(before))) as running:
        assert error_of(running.score({"prompt_ids": [1], "response_ids": [[2] * 20]})) == (503, "out_of_memory")
        assert running.score({"prompt_ids": [1], "response_ids": [[2] * 8] * 5}).status_code == 200


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"signal": "centred"}, "centred"),
        ({"include": ["kl", "entropy"]}, "entropy, kl"),
        ({"top_k": 1}, "alternatives"),
        ({"candidate_ids": [[[1]]]}, "candidate_reward"),
    ],
)
def test_what_an_engine_cannot_compute_is_refused_by_name(options: dict[str, object], names: str) -> None:
    with served(loading(Recorder(info=replace(INFO, quantities=frozenset())))) as running:
        ids = {"prompt_ids": [1], "response_ids": [[1]]}
        refused = running.score({**ids, **options})
        assert error_of(refused) == (422, "unsupported_by_engine")
        assert refused.json()["error"]["message"] == f"this engine cannot compute {names}: omit them"
        assert running.score(ids).status_code == 200


def test_more_alternatives_than_the_vocabulary_has_are_refused() -> None:
    with served(loading(Recorder(info=replace(INFO, vocab_size=5)))) as running:
        refused = running.score({"prompt_ids": [1], "response_ids": [[1]], "top_k": 6})
        assert error_of(refused) == (422, "invalid_request")
        assert "vocabulary of 5" in refused.json()["error"]["message"]


def test_many_callers_at_once_each_get_their_own_numbers() -> None:
    def body(n: int) -> dict[str, object]:
        options = ({}, {"top_k": 3}, {"signal": "centred"}, {"include": ["kl", "reward"]})[n % 4]
        return {"prompt_ids": [n, 1], "response_ids": [[n] * (n % 7), [n + 1, 2]], **options}

    with served(max_batch_tokens=64) as running:
        alone = [running.score(body(n)).json()["results"] for n in range(60)]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda n: running.score(body(n)).json()["results"], range(60)))
    assert together == alone


def test_a_service_that_stops_answers_what_it_admitted() -> None:
    gate = Gate()

    async def live() -> int:
        service = Service(read_settings({}, ()), loading(Recorder(gate)), lambda: None)
        service.start()
        while service.state != "ready":
            await asyncio.sleep(0.01)
        with service.batcher.admission.permit(5) as permit:
            request = ScoreRequest.model_validate(IDS)
            answer = asyncio.create_task(service.scorer().score(request, permit))
            assert await asyncio.to_thread(gate.entered.wait, PATIENCE_S)
            stopping = asyncio.create_task(service.stop())
            await asyncio.sleep(0)
            with pytest.raises(RequestError) as refused:
                service.check_ready()
            assert (refused.value.code, refused.value.status) == ("draining", 503)
            assert refused.value.retry_after_s
            gate.opened.set()
            rows = (await asyncio.wait_for(answer, PATIENCE_S)).rows
            await asyncio.wait_for(stopping, PATIENCE_S)
        return len(rows)

    assert asyncio.run(live()) == 2


def test_a_queue_that_ends_although_the_service_was_not_stopped_is_a_failure() -> None:
    failures: list[None] = []

    async def live() -> Service:
        service = Service(read_settings({}, ()), loading(FakeEngine()), lambda: failures.append(None))
        service.start()
        while service.state != "ready":
            await asyncio.sleep(0.01)
        service.batcher.close()
        while not failures:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(service.stop(), PATIENCE_S)
        return service

    service = asyncio.run(asyncio.wait_for(live(), PATIENCE_S))
    assert (service.state, failures) == ("failed", [None])
    assert service.progress == "the queue ended although the service was not stopped"


def test_a_request_that_outlasts_the_drain_time_is_refused_so_that_it_can_go_elsewhere() -> None:
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        with served(loading(Recorder(gate)), drain_s=1) as running:
            own = httpx2.Client(base_url=running.client.base_url, timeout=PATIENCE_S, trust_env=False)
            late = pool.submit(own.post, "/score", json=IDS)
            wait_until(gate.entered.is_set)
        refused = late.result(PATIENCE_S)
        gate.opened.set()
    own.close()
    assert error_of(refused) == (503, "draining")
    assert refused.headers["retry-after"]


def test_the_longest_sequence_is_the_settings_or_else_the_models() -> None:
    def longest(running: Served) -> object:
        return running.client.get("/models").json()["models"][0]["max_length_tokens"]

    with served() as of_the_models, served(max_length_tokens=100) as shorter, served(max_length_tokens=4096) as equal:
        assert (longest(of_the_models), longest(shorter), longest(equal)) == (4096, 100, 4096)


def test_a_longest_sequence_above_the_models_is_refused_at_the_start() -> None:
    with served(ready=False, max_length_tokens=4097) as running:
        wait_until(lambda: bool(running.failures))
        message = "--max-length-tokens 4097 is too many, the models' limit is 4096: lower it, or leave it out"
        assert running.client.get("/ready").json() == {"state": "failed", "progress": message}


def test_a_service_whose_device_is_lost_answers_what_it_admitted_and_asks_to_be_ended() -> None:
    gate = Gate()

    def before(trunks: Sequence[Trunk]) -> None:
        gate(trunks)
        raise EngineLostError("CUDA error: device-side assert triggered")

    with served(loading(Recorder(before)), max_batch_tokens=5) as running, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(running.score, IDS) for _ in range(2)]
        wait_until(lambda: gate.entered.is_set() and running.service.batcher.admission.held_tokens == 10)
        gate.opened.set()
        errors = sorted(error_of(answer.result(PATIENCE_S)) for answer in answers)
        assert errors == [(500, "internal"), (503, "draining")]
        ready = running.client.get("/ready")
        assert (ready.status_code, ready.json()["state"]) == (503, "failed")
        assert "device-side assert" in ready.json()["progress"]
        assert running.client.get("/health").status_code == 503
        assert running.score(IDS).status_code == 503
    assert running.failures == [None]
    assert running.service.state == "failed"


def test_the_encoder_that_is_served_is_the_one_that_was_loaded() -> None:
    with served() as running:
        assert running.service.scorer().encoder == Encoder.of(running.service.scorer().encoder.tokenizer, "plain")
        assert isinstance(running.service.scorer().encoder.tokenizer, FakeTokenizer)
