"""OpenTelemetry spans of requests, as the SDK's own in-memory exporter has them, and as a collector
gets them."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from PIL import Image

import octavo
from octavo.engine.errors import InputError
from octavo.engine.observability.tracing import RequestSpans, sending_spans

PARAMS = octavo.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STAGES = ["preprocess", "queued", "prefill", "decode"]


@pytest.fixture(scope="module")
def engine() -> Iterator[octavo.AsyncLLM]:
    with octavo.AsyncLLM(dtype="float32", max_model_len=128) as engine:
        yield engine


@pytest.fixture
def exporter(engine: octavo.AsyncLLM) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine.spans = RequestSpans(provider)
    yield exporter
    engine.spans = None


def ask(engine: octavo.AsyncLLM, prompt: Any, **more: Any) -> list[Any]:
    async def collect() -> list[Any]:
        return [delta async for delta in engine.generate(prompt, PARAMS, **more)]

    return asyncio.run(collect())


def test_a_request_with_a_picture_has_its_encoding_in_its_prefill(
    engine: octavo.AsyncLLM, exporter: InMemorySpanExporter
) -> None:
    picture = Image.new("RGB", (56, 56), "red")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    (last,) = [
        d for d in ask(engine, {"messages": [{"role": "user", "content": parts}]}) if d.times
    ]
    spans = by_name(exporter)
    assert {*spans} == {*STAGES, "encode", "request"}
    encode, prefill = spans["encode"], spans["prefill"]
    assert encode.parent is not None and prefill.context is not None
    assert encode.parent.span_id == prefill.context.span_id
    assert encode.start_time == prefill.start_time and encode.end_time <= prefill.end_time
    assert 0 < last.times.encode_s < last.times.prefill_s
    seconds = (encode.end_time - encode.start_time) / 1e9
    assert seconds == pytest.approx(last.times.encode_s, abs=1e-6)


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_and_its_stages(engine: octavo.AsyncLLM, exporter: InMemorySpanExporter) -> None:
    last = ask(engine, "Tell me.", request_id="r", traceparent=f"00-{TRACE}-{SPAN}-01")[-1]
    spans = by_name(exporter)
    assert list(spans) == [*STAGES, "request"]
    request = spans["request"]
    assert request.context is not None and request.parent is not None
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == SPAN
    assert request.attributes == {
        "octavo.request_id": "r",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": last.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 4,
    }
    at = request.start_time
    for name in STAGES:  # one after the other
        stage = spans[name]
        assert stage.parent is not None and stage.parent.span_id == request.context.span_id
        assert stage.start_time == at and stage.end_time is not None
        at = stage.end_time
    assert at is not None and request.end_time is not None and at <= request.end_time
    decode = spans["decode"]
    assert decode.end_time is not None and decode.start_time is not None
    assert (decode.end_time - decode.start_time) / 1e9 == pytest.approx(last.times.decode_s)


@pytest.mark.parametrize("traceparent", [None, "", "nonsense", "00-0-0-01", "\ud800"])
def test_what_is_no_traceparent_begins_a_trace(
    engine: octavo.AsyncLLM, exporter: InMemorySpanExporter, traceparent: str | None
) -> None:
    ask(engine, "Tell me.", traceparent=traceparent)
    assert by_name(exporter)["request"].parent is None


def test_a_rejected_request(engine: octavo.AsyncLLM, exporter: InMemorySpanExporter) -> None:
    with pytest.raises(InputError):
        ask(engine, {"messages": [{"role": "nobody"}]})
    (request,) = exporter.get_finished_spans()
    assert request.status.status_code is StatusCode.ERROR and request.attributes is not None
    assert request.attributes["error.type"] == "INVALID_ARGUMENT"


def test_sent_to_a_collector(engine: octavo.AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """By OTLP, at the path of the standard, whether an option or a variable names it."""
    got: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Not on stderr."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        with sending_spans(f"{endpoint}/") as engine.spans:
            ask(engine, "One.")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        with sending_spans(None) as engine.spans:
            ask(engine, "Two.")
        monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
        with sending_spans(None) as nothing:
            assert nothing is None
    finally:
        engine.spans = None
        server.shutdown()
        server.server_close()
    assert [path for path, _ in got] == ["/v1/traces"] * 2
    for _, body in got:
        (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
        assert [
            pair.value.string_value
            for pair in resource.resource.attributes
            if pair.key == "service.name"
        ] == ["octavo"]
        names = [span.name for span in resource.scope_spans[0].spans]
        assert names == [*STAGES, "request"]
