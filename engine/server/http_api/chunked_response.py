"""Chunked HTTP responses: server-sent events and large JSON."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..chunked_json import Turns, json_pieces


class PiecesResponse(Response):
    """Sends chunks as the client reads them. Closes `on_end` in any case."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        on_end: contextlib.AsyncExitStack,
        headers: Mapping[str, str],
        media_type: str,
    ) -> None:
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._pieces, self._on_end = pieces, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with self._on_end:
            await send(start)
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event_stream(
    events: AsyncGenerator[bytes, None],
    on_end: contextlib.AsyncExitStack,
    headers: Mapping[str, str],
) -> Response:
    """Return a response of server-sent events."""
    on_end.push_async_callback(events.aclose)
    headers = {**headers, "cache-control": "no-cache"}
    return PiecesResponse(events, on_end, headers, "text/event-stream")


def json_response(
    value: Any, on_end: contextlib.AsyncExitStack, headers: Mapping[str, str], turns: Turns
) -> Response:
    """Return a JSON response: small ones with a content length, large ones chunked."""
    pieces = json_pieces(value)
    head = list(itertools.islice(pieces, 2))
    if len(head) == 1:
        body = PiecesResponse(_once(head[0]), on_end, headers, "application/json")
        body.headers["content-length"] = str(len(head[0]))
        return body
    paced = turns.paced(itertools.chain(head, pieces))
    return PiecesResponse(paced, on_end, headers, "application/json")


async def _once(piece: bytes) -> AsyncIterator[bytes]:
    yield piece
