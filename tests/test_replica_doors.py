"""What the replicas' ingress and a replica's doors do with calls. No cluster is started."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from octavo.engine.replicas.calls import HttpCall, HttpStart
from octavo.engine.replicas.ingress import _http_call
from octavo.engine.replicas.run_http import AHEAD, run_http
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
