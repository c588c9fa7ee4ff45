"""A replica's HTTP door without a socket: an ASGI application is run on one call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message

from .calls import HttpCall, HttpStart

AHEAD = 8  # messages of an answer that wait to be read; then the application waits


async def run_http(app: ASGIApp, call: HttpCall) -> AsyncGenerator[HttpStart | bytes, None]:
    """The answer's head, then its body as it comes. Closing it cancels the application, as a client
    that goes away does."""
    queue: asyncio.Queue[Message | None] = asyncio.Queue()
    room = asyncio.Semaphore(AHEAD)  # and no bound of the queue: the end must always find a place
    messages: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()  # who goes away cancels instead
        return messages.pop()

    async def send(message: Message) -> None:
        await room.acquire()
        queue.put_nowait(message)

    async def run() -> None:
        await app(_scope(call), receive, send)

    task = asyncio.create_task(run())
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (message := await queue.get()) is not None:
            room.release()
            if message["type"] == "http.response.start":
                yield HttpStart(message["status"], tuple(message["headers"]))
            elif message.get("body"):
                yield message["body"]
        await task
    finally:
        task.cancel()
        await asyncio.wait({task})


def _scope(call: HttpCall) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": call.server,
    }
