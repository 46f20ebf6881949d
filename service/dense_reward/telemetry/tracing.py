"""OpenTelemetry spans of requests, recorded once they are answered. Needs the extra `otel`; knows no routes."""

from collections.abc import Mapping
from dataclasses import dataclass

from dense_reward.errors import SettingsError

NANOSECONDS = 1_000_000_000
STAGES = ("encode", "queue", "compute", "describe", "write")


@dataclass(frozen=True, slots=True)
class Answered:
    """An answered request. `started_ns`, `ended_ns`: since the epoch. `stages_s`: the seconds of each stage."""

    method: str
    route: str
    status: int
    request_id: str
    headers: Mapping[str, str]
    started_ns: int
    ended_ns: int
    stages_s: Mapping[str, float]


class Tracing:
    """Sends a span for each request, with a child span for each stage. The caller's span, if sent, is its parent."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: the address of an OTLP receiver over HTTP, such as http://collector:4318.

        Raises SettingsError if the extra `otel` is not installed.
        """
        try:
            from opentelemetry import propagate, trace  # noqa: PLC0415 - an option
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ModuleNotFoundError as error:
            cure = "pip install '.[otel]' in the project's folder"
            raise SettingsError(f"--otlp-endpoint needs {error.name}: {cure}") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "dense-reward"}))
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("dense_reward")
        self._trace, self._propagate = trace, propagate

    def add(self, answered: Answered) -> None:
        """Record a request. Never blocks: a separate thread sends the spans."""
        caller = self._propagate.extract(answered.headers)
        span = self._tracer.start_span(
            f"{answered.method} {answered.route}",
            context=caller,
            kind=self._trace.SpanKind.SERVER,
            start_time=answered.started_ns,
            attributes={
                "http.request.method": answered.method,
                "http.route": answered.route,
                "http.response.status_code": answered.status,
                "dense_reward.request_id": answered.request_id,
            },
        )
        if answered.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        below = self._trace.set_span_in_context(span)
        known = [(name, int(answered.stages_s[name] * NANOSECONDS)) for name in STAGES if name in answered.stages_s]
        # Stages have durations but no start times: they are placed back to back, and the last one ends with the
        # request.
        at_ns = answered.ended_ns - sum(length_ns for _, length_ns in known)
        for name, length_ns in known:
            self._tracer.start_span(name, context=below, start_time=at_ns).end(at_ns + length_ns)
            at_ns += length_ns
        span.end(answered.ended_ns)

    def close(self) -> None:
        """Send the spans that were not sent yet."""
        self._provider.shutdown()
