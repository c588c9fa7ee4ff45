"""Calls to the replicas' ingress and to the servers of a replica. No cluster is started."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from starlette.responses import PlainTextResponse

from octavo.engine.replicas import ingress as ingress_module
from octavo.engine.replicas.calls import Call, GrpcCall, HttpCall, HttpStart
from octavo.engine.replicas.ingress import Ingress, _http_call
from octavo.engine.replicas.read import AT_ONCE, grpc_prefix
from octavo.engine.replicas.run_http import AHEAD, run_http
from octavo.engine.server.api_keys import ApiKeys
from octavo.engine.server.drain import CallTracker
from octavo.engine.server.http_api.middleware import AuthMiddleware
from octavo.proto import octavo_pb2 as pb

KEY = "a-key-of-ours"
REFUSALS: Any = None  # nothing here is refused for its key


async def called(scope: dict[str, Any], body: bytes = b"") -> HttpCall:
    """What the ingress hands on."""

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    base = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}
    call = await _http_call({**base, **scope}, receive)
    assert call is not None
    return call


async def head(app: Any, call: HttpCall) -> HttpStart:
    found, *_ = [message async for message in run_http(app, call)]
    assert isinstance(found, HttpStart)
    return found


@pytest.mark.parametrize(
    ("server", "host", "keys", "status"),
    [
        (("127.0.0.1", 8000), b"evil.example", None, 421),
        (["::1", 8000], b"evil.example:8000", None, 421),
        (("127.0.0.1", 8000), b"localhost:8000", None, 200),
        (("127.0.0.1", 8000), b"evil.example", ApiKeys([KEY]), 200),
        (("10.0.0.7", 8000), b"octavo.default.svc", None, 200),  # of Kubernetes, of a proxy
        (None, b"octavo.default.svc", None, 200),
    ],
)
def test_a_page_whose_name_was_made_to_lead_here_is_rejected(
    server: Any, host: bytes, keys: ApiKeys | None, status: int
) -> None:
    """DNS rebinding, as with `octavo serve`: a replica knows by which address the client
    came to the proxy."""
    guard = AuthMiddleware(PlainTextResponse("let through"), CallTracker(), keys, REFUSALS)
    headers = [(b"host", host), (b"authorization", f"Bearer {KEY}".encode())]
    scope = {"server": server, "headers": headers}

    async def ask() -> HttpStart:
        return await head(guard, await called(scope))

    assert asyncio.run(ask()).status == status


class Long:
    """An application whose answer is long; how much of it has been sent."""

    def __init__(self, num_messages: int) -> None:
        self.num_messages, self.num_sent, self.ended = num_messages, 0, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for index in range(self.num_messages):
                self.num_sent += 1
                await send({"type": "http.response.body", "body": b"%d" % index, "more_body": True})
        finally:
            self.ended = True


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def test_an_answer_is_made_no_faster_than_it_is_read() -> None:
    app = Long(1000)

    async def ask() -> list[Any]:
        answer = run_http(app, await called({}))
        found = [await anext(answer)]
        await turns(100)
        assert app.num_sent <= AHEAD + 1
        found += [message async for message in answer]
        return found

    start, *body = asyncio.run(ask())
    assert start.status == 200
    assert body == [b"%d" % index for index in range(1000)] and app.ended


@pytest.mark.parametrize("num_messages", [0, 1, AHEAD - 1, AHEAD, AHEAD + 1, 1000])
def test_who_goes_away_leaves_no_application_behind(num_messages: int) -> None:
    """It waits for room, or has filled it and ended."""
    app = Long(num_messages)

    async def ask() -> None:
        answer = run_http(app, await called({}))
        await anext(answer)
        await turns(100)
        async with asyncio.timeout(20):
            await answer.aclose()
        assert app.ended
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(ask())


# The ingress


class Replicas:
    """As much of a handle of Serve's as the ingress uses; what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.http = self.grpc = self

    def options(self, stream: bool) -> Replicas:
        return self

    def remote(self, call: Call) -> Replicas:
        self.calls.append(call)
        return self

    async def __aiter__(self) -> AsyncIterator[Any]:
        call = self.calls[-1]
        if isinstance(call, HttpCall):
            yield HttpStart(200, ())
        elif isinstance(call, GrpcCall) and call.method == "GenerateOnce":
            yield pb.GenerateReply().SerializeToString()
        else:
            yield pb.GenerateDelta(text="hello").SerializeToString()

    def cancel(self) -> None:
        pass


class Context:
    """As much of Serve's context of a gRPC call as the ingress uses."""

    def __init__(self, key: str | None) -> None:
        self.code: grpc.StatusCode | None = None
        self._metadata = [] if key is None else [("authorization", f"Bearer {key}")]

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def peer(self) -> str:
        return "ipv4:192.0.2.1:5000"

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, text: str) -> None:
        self.details = text

    def set_trailing_metadata(self, pairs: Any) -> None:
        pass


def make_ingress(replicas: Replicas, folder: Path) -> Any:
    """Of our own class, as Serve makes one of what it wraps it in."""
    keys = folder / "keys.txt"
    keys.write_text(KEY)
    ours: Any = Ingress.__mro__[1]  # type: ignore[attr-defined]
    return ours(replicas, keys)


async def status_of(app: Any, scope: dict[str, Any]) -> tuple[int, bool]:
    """The answer's, and whether the body was read."""
    sent: list[Any] = []
    bodies = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Any:
        if not bodies:
            await asyncio.Event().wait()
        return bodies.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "http", "root_path": "", "query_string": b"", **scope}, receive, send)
    return sent[0]["status"], not bodies


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/chat/completions", None, 401),
        ("/v1/chat/completions", "another-key", 401),
        ("/v1/chat/completions", KEY, 200),
        ("/health", None, 200),
        ("/metrics", None, 401),
    ],
)
def test_the_ingress_sends_no_replica_what_has_no_key(
    tmp_path: Path, path: str, key: str | None, status: int
) -> None:
    replicas = Replicas()
    app = make_ingress(replicas, tmp_path).__serve_build_asgi_app__()
    headers = [(b"content-type", b"application/json")]
    headers += [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    method = "POST" if path.startswith("/v1") else "GET"
    scope = {"method": method, "path": path, "headers": headers}
    found, was_read = asyncio.run(status_of(app, scope))
    assert found == status
    assert len(replicas.calls) == (status == 200)
    assert status == 200 or not was_read


@pytest.mark.parametrize("method", ["Generate", "GenerateOnce"])
@pytest.mark.parametrize("key", [None, "another-key", KEY])
def test_over_grpc_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, key: str | None
) -> None:
    def prefix(request: pb.GenerateRequest) -> Any:
        assert key == KEY, "what has no key is not looked at"
        return grpc_prefix(request)

    monkeypatch.setattr(ingress_module, "grpc_prefix", prefix)
    replicas, context = Replicas(), Context(key)
    asked = getattr(make_ingress(replicas, tmp_path), method)(pb.GenerateRequest(text="a"), context)

    async def ask() -> list[Any]:
        if method == "Generate":
            return [delta async for delta in asked]
        return [await asked]

    (answer,) = asyncio.run(ask())
    if key == KEY:
        assert context.code is None and len(replicas.calls) == 1
        return
    assert context.code is grpc.StatusCode.UNAUTHENTICATED
    assert not replicas.calls
    if method == "Generate":
        assert answer.failure.code == "UNAUTHENTICATED"


def test_a_message_that_octavo_serve_would_not_take_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress_module, "MAX_BODY_BYTES", 1000)
    replicas, context = Replicas(), Context(KEY)
    request = pb.GenerateRequest(text="x" * 1000)
    asyncio.run(make_ingress(replicas, tmp_path).GenerateOnce(request, context))
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "over 1000" in context.details and not replicas.calls


@pytest.mark.parametrize(("size", "apart"), [(10, False), (AT_ONCE + 1, True)])
def test_a_large_message_is_read_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, apart: bool
) -> None:
    threads: list[threading.Thread] = []

    def prefix(request: pb.GenerateRequest) -> Any:
        threads.append(threading.current_thread())
        return grpc_prefix(request)

    monkeypatch.setattr(ingress_module, "grpc_prefix", prefix)
    replicas, request = Replicas(), pb.GenerateRequest(text="x" * size)

    async def ask() -> None:
        made = make_ingress(replicas, tmp_path)
        assert [delta.text async for delta in made.Generate(request, Context(KEY))] == ["hello"]

    asyncio.run(ask())
    assert [thread is not threading.main_thread() for thread in threads] == [apart]
    assert replicas.calls[0].message == request.SerializeToString()  # type: ignore[attr-defined]
