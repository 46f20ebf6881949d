"""OpenTelemetry spans from a real service to a real OTLP receiver."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from running_service import served

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[Span]]]:
    """The receiver's address, and the spans that it received."""
    spans: list[Span] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(body)
            spans.extend(
                s for resource in request.resource_spans for scope in resource.scope_spans for s in scope.spans
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Logs nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", spans
        server.shutdown()
        thread.join()


def test_a_request_is_a_span_below_its_callers_with_its_stages_below_it(receiver: tuple[str, list[Span]]) -> None:
    address, spans = receiver
    with served(otlp_endpoint=address) as running:
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
        asked = {"prompt": "secret prompt", "response": "secret response"}
        answer = running.client.post("/score", json=asked, headers=headers)
        running.client.post("/score", json={})
    scored, refused = [span for span in spans if span.name == "POST /score"]
    assert (scored.trace_id.hex(), scored.parent_span_id.hex()) == (TRACE, CALLER)
    assert refused.trace_id.hex() != TRACE
    attributes = {attribute.key: attribute.value for attribute in scored.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["dense_reward.request_id"].string_value == answer.headers["x-request-id"]
    stages = [span for span in spans if span.parent_span_id == scored.span_id]
    assert [span.name for span in stages] == ["encode", "queue", "compute", "describe", "write"]
    assert scored.start_time_unix_nano <= stages[0].start_time_unix_nano
    assert stages[-1].end_time_unix_nano <= scored.end_time_unix_nano
    assert not [span for span in spans if b"secret" in span.SerializeToString()]


def test_a_receiver_that_is_not_there_keeps_no_answer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1")  # seconds that the exporter retries at the end
    with served(otlp_endpoint="http://127.0.0.1:9") as running:
        assert running.score({"prompt_ids": [1], "response_ids": [[2]]}).status_code == 200


def test_an_answer_tells_its_caller_where_the_time_went() -> None:
    with served() as running:
        for path in ("/score", "/heatmap"):
            answer = running.client.post(path, json={"prompt": "a", "response": "b"})
            parts = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
            assert list(parts) == ["encode", "queue", "compute", "describe", "total", "write"]
            assert all(float(value) >= 0 for value in parts.values())
