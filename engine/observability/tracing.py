"""OpenTelemetry spans: one per request, and one per stage of it.

They are created from recorded times when a request has finished, so steps have no tracing cost.
The libraries (extra `octavo[otel]`) are only imported if spans are exported.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..outputs import RequestTimes

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = logging.getLogger("octavo.server")

Attributes = Mapping[str, str | int | tuple[str, ...]]

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
EXPORT_TIMEOUT = 3.0  # seconds; also bounds the shutdown if the collector is unreachable


class RequestSpans:
    """Writes the spans of requests to a provider's exporters."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("octavo")
        self._propagator = TraceContextTextMapPropagator()

    def write(
        self,
        traceparent: str,
        seconds: float,
        times: RequestTimes | None,
        attributes: Attributes,
        code: str,
    ) -> None:
        """Write the spans of a finished request that took `seconds`.

        `traceparent`: W3C trace context of the caller; ignored if invalid. `times`: durations of
        its stages; None if it was not admitted. `code`: status code; "" if it did not fail.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        end = time.time_ns()
        begin = end - _ns(seconds)
        parent = self._propagator.extract({"traceparent": traceparent})
        span = self._tracer.start_span(
            "request", parent, SpanKind.SERVER, attributes=attributes, start_time=begin
        )
        if code:
            span.set_attribute("error.type", code)
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for name, stage in _stages(times):
            until = min(begin + _ns(stage), end)
            part = self._tracer.start_span(name, inside, start_time=begin)
            if name == "prefill" and times and times.encode_s:
                self._write_encode(part, begin, min(begin + _ns(times.encode_s), until))
            part.end(until)
            begin = until
        span.end(end)

    def _write_encode(self, prefill: Span, begin: int, end: int) -> None:
        """Write the encode span at the start of prefill, even if encoding is spread over it."""
        from opentelemetry.trace import set_span_in_context

        inside = set_span_in_context(prefill)
        self._tracer.start_span("encode", inside, start_time=begin).end(end)


def _stages(times: RequestTimes | None) -> Iterator[tuple[str, float]]:
    """Yield (name, seconds) of the consecutive stages that a request reached."""
    if times is None:
        return
    yield "preprocess", times.preprocess_s
    yield "queued", times.queue_s
    if times.prefill_s is not None:
        yield "prefill", times.prefill_s
    if times.decode_s is not None:
        yield "decode", times.decode_s


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


@contextmanager
def sending_spans(endpoint: str | None) -> Iterator[RequestSpans | None]:
    """Export spans by OTLP over HTTP within this context; the rest is flushed at its end.

    `endpoint`: http://HOST:4318; None: as OpenTelemetry's environment variables say. Yields None
    if neither is set. Raises ValueError if `endpoint` is given and the libraries are missing.
    """
    if endpoint is None and not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
        yield None
        return
    try:
        provider = _provider(endpoint)
    except ImportError:
        text = "OpenTelemetry is not installed; run: pip install 'octavo[otel]'"
        if endpoint is not None:
            raise ValueError(f"--otlp-endpoint {endpoint}: {text}") from None
        log.warning("%s is set but no spans are sent: %s", " or ".join(ENDPOINT_VARIABLES), text)
        yield None
        return
    try:
        yield RequestSpans(provider)
    finally:
        provider.shutdown()


def _provider(endpoint: str | None) -> TracerProvider:
    """Create a provider that exports to `endpoint`. Raises ImportError."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # The exporter adds the path to an address from a variable, but not to an argument.
    address = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
    name = os.environ.get("OTEL_SERVICE_NAME", "octavo")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    exporter = OTLPSpanExporter(endpoint=address, timeout=EXPORT_TIMEOUT)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
