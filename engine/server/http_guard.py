"""What every HTTP request passes before it is looked at: keys, draining, the body's size; and what
ends one whose client has gone."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .http_error import ApiError

MAX_BODY_BYTES = 256 << 20  # as gRPC's messages
OPEN_PATHS = ("/health", "/ready")  # for who watches the process, without a key


class Traffic:
    """The requests that are being answered, and whether more are taken."""

    def __init__(self) -> None:
        self.is_draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._num_active = 0

    def enter(self) -> None:
        self._num_active += 1
        self.idle.clear()

    def leave(self) -> None:
        self._num_active -= 1
        if self._num_active == 0:
            self.idle.set()


def has_key(authorization: str, keys: Sequence[str]) -> bool:
    """Whether a header says "Bearer" and one of the keys; in the same time whichever it is."""
    scheme, _, given = authorization.partition(" ")
    digest = hashlib.sha256(given.strip().encode()).digest()
    found = False
    for key in keys:
        found |= hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest())
    return found and scheme.lower() == "bearer"


class Guard:
    """The one middleware. What it lets through has its whole body, and is cancelled when its
    client goes away, as gRPC does it."""

    def __init__(self, app: ASGIApp, traffic: Traffic, keys: Sequence[str]) -> None:
        self._app, self._traffic, self._keys = app, traffic, tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        posts = scope["method"] == "POST"
        try:
            self._check(Headers(scope=scope), posts)
            body = await _read_body(receive) if posts else b""
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client went away
            return
        if not posts:
            await self._app(scope, receive, send)
            return
        self._traffic.enter()
        try:
            await _run_while_wanted(self._app, body, scope, receive, send)
        finally:
            self._traffic.leave()

    def _check(self, headers: Headers, posts: bool) -> None:
        """Raises `ApiError`."""
        if self._keys and not has_key(headers.get("authorization", ""), self._keys):
            text = "an API key is needed: send the header Authorization: Bearer KEY"
            raise ApiError(401, text, "authentication_error", code="invalid_api_key")
        if not posts:
            return
        if self._traffic.is_draining:
            text = "the server is stopping and takes no more requests"
            raise ApiError(503, text, "server_error", code="draining")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # others a browser sends for any page, unasked
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise _too_large()


def _too_large() -> ApiError:
    text = f"the body is over {MAX_BODY_BYTES} bytes; send smaller media, or URLs"
    return ApiError(413, text, code="request_too_large")


async def _read_body(receive: Receive) -> bytes | None:
    """None when the client went away. Raises `ApiError` for one that is too large."""
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > MAX_BODY_BYTES:
            raise _too_large()
        more = message.get("more_body", False)
    return b"".join(chunks)


async def _run_while_wanted(
    app: ASGIApp, body: bytes, scope: Scope, receive: Receive, send: Send
) -> None:
    """Runs `app` in a task of its own, which is cancelled when the client goes away first."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    is_answered = False

    async def receive_body() -> Message:
        if not messages:
            await asyncio.Event().wait()  # nothing else comes: that the client goes is seen here
        return messages.pop()

    async def send_on(message: Message) -> None:
        nonlocal is_answered
        is_answered |= message["type"] == "http.response.body" and not message.get("more_body")
        await send(message)

    async def wait_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answer = asyncio.ensure_future(app(scope, receive_body, send_on))
    gone = asyncio.ensure_future(wait_gone())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if is_answered or answer.done():
            await answer
    finally:
        gone.cancel()
        answer.cancel()
        await asyncio.wait({answer, gone})
