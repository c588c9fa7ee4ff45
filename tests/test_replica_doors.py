"""What the replicas' ingress and a replica's doors do with calls. No cluster is started."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from octavo.engine.replicas.calls import HttpCall, HttpStart
from octavo.engine.replicas.ingress import _http_call
from octavo.engine.replicas.run_http import run_http
from octavo.engine.server.http_guard import Guard
from octavo.engine.server.keys import ApiKeys
from octavo.engine.server.work import Work

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
def test_a_page_whose_name_was_made_to_lead_here_is_refused(
    server: Any, host: bytes, keys: ApiKeys | None, status: int
) -> None:
    """DNS rebinding, as at the door of `octavo serve`: a replica knows by which address the client
    came to the proxy."""
    guard = Guard(PlainTextResponse("let through"), Work(), keys, REFUSALS)
    headers = [(b"host", host), (b"authorization", f"Bearer {KEY}".encode())]
    scope = {"server": server, "headers": headers}

    async def ask() -> HttpStart:
        return await head(guard, await called(scope))

    assert asyncio.run(ask()).status == status
