"""Traces of requests, exported over OTLP if the settings name an endpoint.

A request is a span from its arrival to its end, with a child span for every try on a replica. The context of a try is
sent to the engine as `traceparent` (W3C Trace Context), so that vLLM's span becomes its child; the request's span is a
child of the client's, if the client sends a context. Spans contain the fields of the ledger's row: never a prompt, an
answer, an image or a key.

The module is only imported if there is an endpoint: without one, a request costs one comparison with None.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.billing.records import Outcome, RequestRecord
from serving.errors import ServingError
from serving.settings.telemetry import TelemetrySettings

_PROPAGATOR = TraceContextTextMapPropagator()
_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
_EXPORT_TIMEOUT_S = 5.0
_EXPORT_EVERY_MS = 1000
_FAILED = (Outcome.FAILED, Outcome.TIMED_OUT)
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_NS_PER_S = 10**9


class Traces:
    """Exports the spans of one router process in batches from a separate thread. Spans are dropped if the collector
    does not accept them.

    The settings must name an endpoint. Headers for it, such as a key, come from the SDK's variable
    `OTEL_EXPORTER_OTLP_HEADERS`.
    """

    def __init__(self, settings: TelemetrySettings, router_id: str) -> None:
        # The client's sampling decision is not binding: clients must not be able to make us export more than our ratio.
        ratio = TraceIdRatioBased(settings.trace_ratio)
        self._provider = TracerProvider(
            sampler=ParentBased(root=ratio, remote_parent_sampled=ratio),
            resource=Resource.create({"service.name": "serving-router", "service.instance.id": router_id}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=settings.traces_url, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_EVERY_MS))
        self._tracer = self._provider.get_tracer("serving")

    def begin(self, route: str, headers: Mapping[bytes, bytes], arrived_ns: int) -> RequestTrace:
        """Start the trace of a request, below the client's span if there is a `traceparent`."""
        given = {name.decode(): headers[name].decode("latin-1") for name in _CONTEXT_HEADERS if name in headers}
        span = self._tracer.start_span(
            f"POST {route}",
            context=_PROPAGATOR.extract(given),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": route},
            start_time=arrived_ns,
        )
        return RequestTrace(self._tracer, span)

    def close(self) -> None:
        """Export the remaining spans. Blocks, for a few seconds if the collector does not answer."""
        self._provider.shutdown()


class RequestTrace:
    """The spans of one request."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._is_trying = False
        self._tried_ns = 0
        self._record: RequestRecord | None = None

    @contextlib.contextmanager
    def trying(self, replica_id: str) -> Iterator[dict[str, str]]:
        """Trace a try on a replica while the context lasts. Yields the headers to send to the engine."""
        context = set_span_in_context(self._span)
        attributes = {"serving.replica": replica_id}
        span = self._tracer.start_span("engine", context=context, kind=SpanKind.CLIENT, attributes=attributes)
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, context=set_span_in_context(span))
        self._is_trying = True
        try:
            yield headers
        except ServingError as error:
            _mark_failed(span, error.code or type(error).__name__)
            raise
        finally:
            self._is_trying = False
            self._tried_ns = time.time_ns()
            span.end(self._tried_ns)
            if self._record is not None:
                self._end(self._record)

    def end(self, record: RequestRecord) -> None:
        """End the request's span after the request was accounted for and its last bytes were sent."""
        if self._is_trying:
            self._record = record
        else:
            self._end(record)

    def _end(self, record: RequestRecord) -> None:
        span = self._span
        tokens = record.tokens
        span.set_attributes(
            {
                "http.response.status_code": record.status,
                "gen_ai.operation.name": _OPERATIONS.get(record.route, "other"),
                "gen_ai.request.model": record.model,
                "gen_ai.usage.input_tokens": tokens.num_prompt_tokens,
                "gen_ai.usage.output_tokens": tokens.num_completion_tokens,
                "serving.request_id": record.request_id,
                "serving.tenant": record.tenant_id,
                "serving.outcome": str(record.outcome),
                "serving.pages": record.num_pages,
                "serving.image_tokens": tokens.num_image_tokens,
                "serving.tries": record.num_tries,
                "serving.queue_wait_seconds": record.queue_wait_ns / _NS_PER_S,
            }
        )
        if record.first_byte_ns:
            span.add_event("first_byte", timestamp=record.first_byte_ns)
        if record.outcome in _FAILED:
            _mark_failed(span, record.error_code)
        elif record.error_code:
            span.set_attribute("error.type", record.error_code)
        span.end(max(record.ended_ns, self._tried_ns))


def _mark_failed(span: Span, code: str) -> None:
    span.set_status(Status(StatusCode.ERROR))
    span.set_attribute("error.type", code)
