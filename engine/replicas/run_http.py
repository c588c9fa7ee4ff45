"""Run an ASGI application for one call, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message

from .calls import HttpCall, HttpStart

AHEAD = 8  # unread response messages before the application has to wait


async def run_http(app: ASGIApp, call: HttpCall) -> AsyncGenerator[HttpStart | bytes, None]:
    """Yield the response's head, then parts of its body. Closing it cancels the application."""
    queue: asyncio.Queue[Message | None] = asyncio.Queue()
    capacity = asyncio.Semaphore(
        AHEAD
    )  # the queue itself is unbounded, so that the end marker always fits
    messages: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()  # never ends: disconnects cancel the task
        return messages.pop()

    async def send(message: Message) -> None:
        await capacity.acquire()
        queue.put_nowait(message)

    async def run() -> None:
        await app(_scope(call), receive, send)

    task = asyncio.create_task(run())
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (message := await queue.get()) is not None:
            capacity.release()
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
