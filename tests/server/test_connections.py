"""Idle, malformed and unread connections are bounded in number, time and log volume."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from octavo.benchmarks.fakes.tiny_checkpoint import write_tiny_checkpoint
from octavo.benchmarks.fakes.tiny_server import Served, wait_for
from octavo.benchmarks.fuzz import connections as connection_fuzz
from octavo.engine.cli.serve import listening_text
from octavo.engine.observability.rejection_log import RejectionLog
from octavo.engine.server import connections
from octavo.engine.server import drain as work
from octavo.engine.server.api_keys import ApiKeys
from octavo.engine.server.connections import Acceptor, ConnectionLimits, Slot, peer_of
from octavo.engine.server.drain import CallTracker
from octavo.engine.server.grpc_api import interceptor
from octavo.engine.server.http_api.connection import HttpConnection, Timeouts, http_config
from octavo.engine.server.http_api.middleware import MAX_BODY_BYTES, AuthMiddleware
from octavo.engine.server.http_api.openai_stream import dump
from octavo.engine.utils import logs
from octavo.proto import octavo_pb2 as pb
from octavo.proto import octavo_pb2_grpc

KEY = "the-first-key"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer " + KEY.encode() + b"\r\n"
)
STREAM = POST.replace(b"/v1/completions", b"/stream") + b"Content-Length: 0\r\n\r\n"


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve `/health`, an endless `/stream`, and else the size of the request body."""
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            part = {"type": "http.response.body", "body": b"x" * 50_000, "more_body": True}
            await send(part)
            await asyncio.sleep(0)
    body = (await receive()).get("body", b"")
    response: Any = PlainTextResponse("ok")
    if scope["method"] == "POST":
        response = JSONResponse({"size": len(body)})
    await response(scope, receive, send)


class Site:
    """The HTTP server's connections and auth middleware around `application`, without an engine."""

    def __init__(
        self,
        timeouts: Timeouts | None = None,
        total: int = 64,
        listener: socket.socket | None = None,
    ) -> None:
        self.counts: dict[str, int] = {}
        self.timeouts, self.total, self.work = timeouts or Timeouts(), total, CallTracker()
        stats: Any = SimpleNamespace(count_error=self._count, count_closed_connection=self._count)
        self.rejections = RejectionLog(stats)
        self.listener = listener or socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address = self.listener.getsockname()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.run(self._start())

    def _count(self, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1

    async def _start(self) -> None:
        keys = ApiKeys([KEY])
        guard = AuthMiddleware(
            application, self.work, keys, self.rejections, 1 << 30, self.timeouts.body
        )
        config, state = http_config(guard), ServerState()

        def connect(slot: Slot) -> HttpConnection:
            return HttpConnection(config, state, slot, self.timeouts, self.work, self.rejections)

        limits = ConnectionLimits(self.total)
        self.acceptor = Acceptor(self.listener, connect, limits, self.rejections)

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def open(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(self.address, timeout=20)
        connection.sendall(data)
        return connection

    def ask(self, data: bytes = HEALTH) -> bytes:
        with self.open(data) as connection:
            return read_all(connection)

    async def _stop(self) -> None:
        await self.acceptor.close_all(0.0)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        self.run(self._stop())  # a task left pending would log an error in a later test
        self.loop.call_soon_threadsafe(self.loop.stop)


def read_all(connection: socket.socket) -> bytes:
    """Return what a server sends until it closes or resets the connection."""
    found = b""
    with suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            found += data
    return found


@pytest.fixture
def make_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Site]]:
    monkeypatch.setattr(connections, "CHECK_INTERVAL", 0.05)
    monkeypatch.setattr(connections, "MIN_WAIT", 0.0)
    with ExitStack() as stack:

        def make(**settings: Any) -> Site:
            site = Site(**settings)
            stack.callback(site.close)
            return site

        yield make


@pytest.mark.lesson("L38")
def test_idle_connections_half_sent_heads_are_closed(make_site: Callable[..., Site]) -> None:
    """Close silent connections and incomplete headers, even if bytes keep trickling in."""
    site = make_site(timeouts=Timeouts(head=0.4))
    silent, half = site.open(), site.open(b"GET /health HTTP/1.1\r\nHo")
    dribbling = site.open(b"GET /health HTTP/1.1\r\nX: ")
    wait_for(lambda: not _dribble(dribbling))
    assert read_all(silent) == read_all(half) == b""
    wait_for(lambda: len(site.acceptor) == 0)
    assert site.counts == {"receive_timeout": 3}
    again = site.open(HEALTH.replace(b"Connection: close\r\n", b"") + b"GET /hea")
    assert read_all(again).startswith(b"HTTP/1.1 200"), "the first request gets an answer"


def _dribble(connection: socket.socket) -> bool:
    """Send one byte; return False if the connection is closed."""
    time.sleep(0.02)
    try:
        connection.sendall(b"a")
    except OSError:
        return False
    return True


@pytest.mark.lesson("L38")
def test_idle_connections_slow_bodies_end_with_408(make_site: Callable[..., Site]) -> None:
    site = make_site(timeouts=Timeouts(body=0.4))
    with site.open(POST + b"Content-Length: 100000\r\n\r\n") as slow:
        wait_for(lambda: not _dribble(slow))
    with site.open(POST + b"Content-Length: 100000\r\n\r\n{") as slow:
        answer = read_all(slow)
    assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert "retry" in error["message"] and error["code"] == "request_timeout"
    assert site.work.num_running == 0


def test_a_long_upload_that_makes_progress_is_received(make_site: Callable[..., Site]) -> None:
    """An upload's total time is unbounded; only the time of each 64 KiB is bounded."""
    site = make_site(timeouts=Timeouts(body=1.0))
    with site.open(POST + b"Content-Length: 655360\r\nConnection: close\r\n\r\n") as upload:
        for _ in range(10):
            time.sleep(0.2)
            upload.sendall(b"x" * 65536)
        assert read_all(upload).endswith(b'{"size":655360}')


def test_an_upload_in_progress_is_not_in_flight_work(make_site: Callable[..., Site]) -> None:
    site = make_site()
    with site.open(POST + b"Content-Length: 10\r\nConnection: close\r\n\r\n{") as upload:
        wait_for(lambda: len(site.acceptor) == 1)
        assert site.run(site.work.drain(None)) == 0, "draining does not wait for it"
        upload.sendall(b"x" * 9)
        assert read_all(upload).startswith(b"HTTP/1.1 503")


@pytest.mark.lesson("L38")
def test_idle_connections_make_way_at_the_limit(make_site: Callable[..., Site]) -> None:
    """The longest-waiting connections are closed, but none with a request in progress."""
    site = make_site(total=8)
    streaming = site.open(
        POST.replace(b"/v1/completions", b"/stream") + b"Content-Length: 0\r\n\r\n"
    )
    assert streaming.recv(100)
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(site.open(b"POST / HTTP/1.1\r\nHost: x\r\nContent-"))
        assert site.ask().startswith(b"HTTP/1.1 200")
        assert len(site.acceptor) <= 8
    assert site.counts["connection_limit"] >= 33
    for _ in range(100):
        assert streaming.recv(10_000), "the stream was closed"
    streaming.close()


def test_one_peer_has_a_share_of_the_waiting_connections() -> None:
    assert ConnectionLimits(8192).waiting_per_peer == 2048
    addresses = [("10.0.0.1", 5), ("::ffff:10.0.0.1", 5, 0, 0), ("10.0.0.2", 5)]
    assert [peer_of(each) for each in addresses] == ["10.0.0.1", "10.0.0.1", "10.0.0.2"]
    assert peer_of(("2001:db8::1", 1)) == peer_of(("2001:db8::2", 2)) == "2001:db8::/64"
    assert peer_of(("::1", 1)) == "::1"


class FullListener(socket.socket):
    """A listener of a process that is out of file descriptors for the first accepts."""

    num_failures = 5

    def accept(self) -> Any:
        if self.num_failures:
            self.num_failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


@pytest.mark.lesson("L38")
def test_idle_connections_out_of_descriptors(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    listener = FullListener()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    site = make_site(listener=listener)
    assert site.ask().startswith(b"HTTP/1.1 200"), "the connection should wait in the backlog"
    assert site.counts == {"accept_error": 5}
    assert len(caplog.records) == 1


@pytest.mark.lesson("L38")
def test_idle_connections_endless_headers(make_site: Callable[..., Site]) -> None:
    """Headers are bounded with and without httptools, which has no limit."""
    site = make_site()
    with site.open(b"GET /health HTTP/1.1\r\nHost: localhost\r\n") as endless:
        sent = 0
        with suppress(OSError):
            while sent < 8 << 20:
                endless.sendall(b"X-A: b\r\n" * 8192)
                sent += 65536
    assert sent < 8 << 20
    chunk = b"5;" + b"e" * (1 << 20)
    assert site.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk).startswith(
        b"HTTP/1.1 400"
    )


@pytest.mark.lesson("L38")
def test_idle_connections_unread_responses_end(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.work.send_timeout = 0.3
    unread = site.open(STREAM)
    wait_for(lambda: site.counts.get("send_timeout") == 1, 30)
    wait_for(lambda: len(site.acceptor) == 0 and site.work.num_running == 0)
    unread.close()


@pytest.mark.parametrize("is_rejected", [False, True])
def test_unread_request_body_is_bounded(make_site: Callable[..., Site], is_rejected: bool) -> None:
    """The response was sent before the body arrived."""
    site = make_site(timeouts=Timeouts(body=0.2))
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    if is_rejected:
        head = POST.replace(KEY.encode(), b"wrong-key-0001")
    head += f"Content-Length: {MAX_BODY_BYTES}\r\n\r\n".encode()
    with site.open(head) as endless, pytest.raises(OSError):
        for _ in range(200):
            endless.sendall(b"x" * 65536)
    wait_for(lambda: len(site.acceptor) == 0)


INVALID = [
    b"\0" * 100,
    b"GET\r\n\r\n",
    b"GET / HTTP/9\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(range(256)),
    connection_fuzz.PREFACE + connection_fuzz.SETTINGS,
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    POST + b"Content-Length: 0\r\n\r\nGARBAGE\r\n\r\n",
    HEALTH.replace(b"Connection: close\r\n", b"") * 3 + b"\xff\xff\r\n\r\n",
    b"GET http://a/health HTTP/1.1\r\nHost: a\r\n\r\n",
]


@pytest.mark.lesson("L38")
def test_idle_connections_invalid_http_does_not_fill_the_log(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    for _ in range(20):
        for data in INVALID:
            with site.open(data) as connection:
                connection.settimeout(0.02)
                with suppress(OSError):
                    connection.recv(1 << 16)
    assert site.ask().startswith(b"HTTP/1.1 200")
    assert site.counts["invalid_http"] >= 100
    assert len(caplog.records) <= 2 and not any(each.exc_info for each in caplog.records)
    assert all(each.name == "octavo.server" for each in caplog.records)


def test_100_continue_comes_when_the_body_is_read(make_site: Callable[..., Site]) -> None:
    site = make_site()
    expect = b"Expect: 100-continue\r\nConnection: close\r\n"
    with site.open(POST + expect + b"Content-Length: 5\r\n\r\n") as upload:
        assert upload.recv(25).startswith(b"HTTP/1.1 100")
        upload.sendall(b"hello")
        assert b'{"size":5}' in read_all(upload)
    too_large = f"Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode()
    assert site.ask(POST + expect + too_large).startswith(b"HTTP/1.1 413")


def test_pipelined_requests_are_answered_in_order(make_site: Callable[..., Site]) -> None:
    site = make_site()
    many = HEALTH.replace(b"Connection: close\r\n", b"") * 50 + HEALTH
    assert site.ask(many).count(b"HTTP/1.1 200") == 51


@pytest.mark.lesson("L38")
def test_idle_connections_of_the_metrics_port_hold_no_threads() -> None:
    stats: Any = SimpleNamespace(count_closed_connection=lambda reason: None)
    with _metrics(stats) as address, ExitStack() as stack:
        num_threads = threading.active_count()
        for _ in range(50):
            stack.enter_context(socket.create_connection(address))
        for method, status in ((b"GET", b"200"), (b"OPTIONS", b"200"), (b"POST", b"405")):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(method + b" /metrics HTTP/1.0\r\n\r\n")
                assert read_all(connection).startswith(b"HTTP/1.1 " + status), method
        assert threading.active_count() == num_threads
        for bad in (b"X" * 20_000, b"GET\r\n\r\n", b"GET / SPDY\r\n\r\n"):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(bad)
                assert read_all(connection).startswith(b"HTTP/1.1 4") or len(bad) > 9999


@contextmanager
def _metrics(stats: Any) -> Iterator[tuple[str, int]]:
    """Run a metrics server without metrics."""
    from prometheus_client import CollectorRegistry

    from octavo.engine.server.metrics_server import MetricsServer

    with MetricsServer(stats, CollectorRegistry(), "127.0.0.1", 0) as server:
        yield connection_fuzz.parse_address(server.address)


# gRPC


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    served = Served(checkpoint, dtype="float32", max_model_len=1024, kv_cache_memory_bytes=32 << 20)
    yield served
    served.wait_empty()
    served.close()


def test_health_lists_its_services(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        found = stub.List(health_pb2.HealthListRequest()).statuses
        assert {"", "octavo.v1.Inference"} <= set(found)
        assert {each.status for each in found.values()} == {health_pb2.HealthCheckResponse.SERVING}
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            stub.Check(health_pb2.HealthCheckRequest(service="no such"))
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="no such"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
    assert not caplog.records


METHODS = [
    *(f"/grpc.health.v1.Health/{name}" for name in ("Check", "List", "Watch", "Nope")),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    *(f"/octavo.v1.Control/{name}" for name in ("Drain", "GetLoad", "Abort", "Nope")),
    *(f"/octavo.v1.Inference/{name}" for name in ("Generate", "Tokenize")),
    *("/no.such/Method", "/", "//"),
]


@pytest.mark.parametrize("path", METHODS)
def test_malformed_calls_write_nothing_into_the_log(
    served: Served, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    with served.another() as address, grpc.insecure_channel(address) as channel:
        for data in (b"\xff", b"\x0a\xff\xff", b"\x0a\x03\xff\xfe\xfd", os.urandom(100)):
            with suppress(grpc.RpcError):
                list(channel.unary_stream(path)(data, timeout=0.3))
            with suppress(grpc.RpcError):
                list(channel.stream_stream(path)(iter(()), timeout=0.3))
    assert not [each for each in caplog.records if each.exc_info]
    # Random bytes may form a valid request, which is logged when it finishes.
    assert not [each for each in caplog.records if each.name != "octavo.request"]


@pytest.mark.lesson("L38")
def test_idle_connections_a_call_without_its_message_ends(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptor, "MESSAGE_TIMEOUT", 0.2)
    held = threading.Event()

    def nothing() -> Iterator[bytes]:
        held.wait(20)
        yield from ()

    with grpc.insecure_channel(served.address) as channel:
        call = channel.stream_unary("/octavo.v1.Control/GetLoad").future(nothing())
        with pytest.raises(grpc.RpcError) as late:
            call.result(20)
        held.set()
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "0.2 s" in late.value.details()


@pytest.mark.lesson("L38")
def test_idle_connections_a_stream_that_is_not_read_ends(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unread stream does not delay draining; a late reader gets the sent data and a status."""
    monkeypatch.setattr(work, "SEND_TIMEOUT", 0.5)
    sampling = pb.SamplingParams(max_tokens=900, ignore_eos=True, n=16, logprobs=20)
    request = pb.GenerateRequest(text="hello", sampling=sampling)
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with served.another() as address, grpc.insecure_channel(address, options) as channel:
        stream = octavo_pb2_grpc.InferenceStub(channel).Generate(request)
        next(stream)
        drain = octavo_pb2_grpc.ControlStub(channel).Drain
        assert drain(pb.DrainRequest(timeout_s=60)).num_running == 0
        with pytest.raises(grpc.RpcError) as unread:
            list(stream)
    assert unread.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "not read" in unread.value.details()


def test_several_requests_may_share_an_x_request_id(served: Served) -> None:
    """`x-request-id` may be a shared trace id; `request_id` must be unique."""
    shared = (("x-request-id", "trace-1"),)
    sampling = pb.SamplingParams(max_tokens=900, ignore_eos=True)
    with grpc.insecure_channel(served.address) as channel:
        stub = octavo_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(text="hello", sampling=sampling)
        first = stub.Generate(request, metadata=shared)
        names = [next(first).request_id]
        second = stub.Generate(request, metadata=shared)
        names.append(next(second).request_id)
        assert names[0] == "trace-1" and re.fullmatch(r"trace-1-[0-9a-f]{12}", names[1])
        named = pb.GenerateRequest(request_id="trace-1", text="hello", sampling=sampling)
        with pytest.raises(grpc.RpcError, match="ALREADY_EXISTS"):
            next(stub.Generate(named))
        assert stub.Abort(pb.AbortRequest(request_id=names[1])).found
        assert [delta.finish_reason for delta in second][-1] == pb.FINISH_REASON_ABORT
        first.cancel()
    served.wait_empty()


# The log


def test_a_repeated_line_is_throttled(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    throttle = logs.Throttle(lambda: now)

    def passes(name: str, message: str = "text %s", **more: Any) -> bool:
        record = logging.makeLogRecord({"name": name, "msg": message, "args": ("a",), **more})
        passed.append(record)
        return throttle.filter(record)

    passed: list[logging.LogRecord] = []
    assert all(passes("octavo.request", finish_reason="stop") for _ in range(500))
    rejected = [passes("octavo.request", finish_reason="refused", code="X") for _ in range(500)]
    assert sum(rejected) == logs.MAX_REJECTIONS
    assert passes("octavo.request", finish_reason="refused", code="Y")
    library = [passes("asyncio", f"error {i} %s") for i in range(500)]
    assert sum(library) == logs.MAX_LIBRARY_LINES, "limited whatever the texts"
    errors = [passes("octavo.server", exc_info=(None, None, None)) for _ in range(50)]
    assert sum(errors) == logs.MAX_TRACEBACKS
    now += logs.THROTTLE_INTERVAL
    assert passes("asyncio")
    assert passed[-1].getMessage() == "text a (480 similar suppressed)"


def test_json_is_one_line_for_clients_that_split_at_unicode_separators() -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    written = dump({"text": text})
    assert json.loads(written) == {"text": text}
    assert len(written.decode().splitlines()) == 1


def test_the_log_says_which_apis_are_served() -> None:
    without = listening_text("127.0.0.1:1", "", False)
    assert "gRPC API on 127.0.0.1:1" in without and "--http-port" in without
    both = listening_text("127.0.0.1:1", "127.0.0.1:2", True)
    assert "with TLS" in both and "https://127.0.0.1:2/v1" in both and "--http-port" not in both


# A whole server


@contextmanager
def limited_server(folder: Path, num_descriptors: int) -> Iterator[Any]:
    """Run `octavo serve` with API keys, few file descriptors and all its ports."""
    command = [sys.executable, "-P", "-m", "octavo.engine.cli.main", "serve", "--model"]
    command += [str(write_tiny_checkpoint(folder)), "--port", "0", "--http-port", "0"]
    command += ["--metrics-port", "0", "--dtype", "float32", "--max-model-len", "512"]
    log = (folder / "log").open("w")
    limit = f'ulimit -n {num_descriptors}; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", limit, "-", *command, "--kv-cache-memory-bytes", "4000000"],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "OCTAVO_API_KEYS": KEY},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = dict(each.split("=", 1) for each in line.split()[1:])
    addresses = [connection_fuzz.parse_address(found[name]) for name in ("http", "grpc", "metrics")]
    try:
        yield SimpleNamespace(process=process, addresses=addresses, log=folder / "log")
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 0, (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()
        log.close()


def _open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _fuzz(folder: Path, seeds: range, num_descriptors: int) -> None:
    """Fuzz a server; then all ports must answer, and descriptors, threads and log be bounded."""
    with limited_server(folder, num_descriptors) as server, ExitStack() as stack:
        http, rpc, metrics = server.addresses
        pid, before = server.process.pid, _threads(server.process.pid)
        connection_fuzz.play_all(seeds, server.addresses)
        for _ in range(num_descriptors + 40):
            half = stack.enter_context(socket.create_connection(http, timeout=60))
            half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-")
        assert _open_descriptors(pid) < num_descriptors
        assert connection_fuzz.is_healthy(http)
        with grpc.insecure_channel(f"{rpc[0]}:{rpc[1]}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            assert check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True).status
        with socket.create_connection(metrics, timeout=30) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            text = read_all(connection)
        assert b'octavo_connections_closed_total{reason="invalid_http"}' in text
        assert _threads(pid) <= before + 8
        log = server.log.read_text()
        assert "Traceback" not in log and len(log) < 8000, log[:4000]


@pytest.mark.lesson("L38")
def test_idle_connections_random_bytes_and_stalls(tmp_path: Path) -> None:
    _fuzz(tmp_path, range(150), 256)


@pytest.mark.lesson("L38")
@pytest.mark.slow
@pytest.mark.parametrize("first", [1000, 4000, 7000])
def test_idle_connections_more_random_bytes_and_stalls(tmp_path: Path, first: int) -> None:
    _fuzz(tmp_path, range(first, first + 3000), 256)
