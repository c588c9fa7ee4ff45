"""HTTP middleware: authentication, draining, body limits, cancellation when clients disconnect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ....scheduler.params import truncated_repr
from ...errors import RequestError
from ...observability.rejection_log import API_KEY, RejectionLog
from ..api_keys import ApiKeys
from ..drain import CallTracker
from ..errors import RequestRejected
from ..metadata import MAX_REQUEST_ID
from .errors import ApiError, api_error, error_of
from .page_route import PATHS

MAX_BODY_BYTES = 256 << 20  # the same as for gRPC messages
MAX_BODIES_BYTES = 4 << 30  # of all calls in flight together
# Each PROGRESS_BYTES of a body, or the rest, must arrive within BODY_TIMEOUT seconds.
PROGRESS_BYTES = 64 << 10
BODY_TIMEOUT = 30.0
OPEN_PATHS = ("/health", "/ready", *PATHS)  # need no key: probes and the page's files


class RequestBodyBudget:
    """Limits the total body bytes of calls in flight. Not thread-safe."""

    def __init__(self, most: int = MAX_BODIES_BYTES) -> None:
        self.num_bytes, self._most = 0, most

    @contextlib.contextmanager
    def call(self) -> Iterator[Callable[[int], None]]:
        """Count a call's bytes until it ends.

        Yields a callback that takes the size of each received part and raises `ApiError` above the
        limit. A single call may exceed it.
        """
        held = 0

        def take(size: int) -> None:
            nonlocal held
            if held < self.num_bytes and self.num_bytes + size > self._most:
                text = f"request bodies in flight have {self.num_bytes} bytes already; retry later"
                raise api_error(RequestError("RESOURCE_EXHAUSTED", text))
            held, self.num_bytes = held + size, self.num_bytes + size

        try:
            yield take
        finally:
            self.num_bytes -= held


class AuthMiddleware:
    """Checks requests and reads their bodies before the application runs.

    The application is cancelled when the client disconnects, as in gRPC. Draining does not wait for
    incomplete bodies; their requests are rejected when complete.
    """

    def __init__(
        self,
        app: ASGIApp,
        work: CallTracker,
        keys: ApiKeys | None,
        rejections: RejectionLog,
        max_bytes: int = MAX_BODIES_BYTES,
        body_timeout: float = BODY_TIMEOUT,
    ) -> None:
        """Wrap `app`. `max_bytes`: limit on the bodies of all calls in flight."""
        self._app, self._work, self._keys, self._rejections = app, work, keys, rejections
        self._bodies, self._body_timeout = RequestBodyBudget(max_bytes), body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send = _echoing(Headers(scope=scope), send)
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        posts = scope["method"] == "POST"
        try:
            self._check_key(Headers(scope=scope), scope)
            self._check_host(Headers(scope=scope), scope)
            self._check(Headers(scope=scope), posts)
            if posts:
                self._work.check_not_draining()
                with self._bodies.call() as take:
                    body = await read_body(receive, take, self._body_timeout)
                    if body is not None:  # else the client has disconnected
                        with self._work.call():
                            await _run_until_disconnect(self._app, body, scope, receive, send)
                return
        except (ApiError, RequestRejected) as error:
            await error_of(error).response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_key(self, headers: Headers, scope: Scope) -> None:
        """Raise `ApiError` for a missing or invalid API key."""
        given = headers.get("authorization")
        if self._keys is not None and not self._keys.accept(given):
            self._rejections.add(API_KEY, "{}:{}".format(*scope.get("client") or ("?", "?")))
            raise api_error(self._keys.fault(given))

    def _check_host(self, headers: Headers, scope: Scope) -> None:
        """Raise `ApiError` for a foreign Host header on loopback without keys (DNS rebinding).

        Local browsers are trusted then, but pages of other sites are not. A site whose name
        resolves to this machine sends that name.
        """
        server = (scope.get("server") or ("",))[0]
        host = headers.get("host", "")
        if self._keys is None and _is_loopback(server) and not _is_of_this_machine(host):
            raise ApiError(
                421,
                f"Host {truncated_repr(host)}: without API keys only localhost and IP addresses "
                "are accepted; configure API keys, or have the proxy send Host: localhost",
            )

    def _check(self, headers: Headers, posts: bool) -> None:
        """Raise `ApiError` for the wrong content type or a body that is too large."""
        if not posts:
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers send others cross-site without CORS
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise _too_large()


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


def _is_of_this_machine(host: str) -> bool:
    """Return whether a Host header cannot be the name of another site."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ip_address(name)
    except ValueError:
        return name in ("", "localhost") or name.endswith(".localhost")
    return True


def _echoing(headers: Headers, send: Send) -> Send:
    """Add the request's x-request-id to the response, also to errors."""
    name = headers.get("x-request-id", "")
    if not name or len(name) > MAX_REQUEST_ID:
        return send

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).setdefault("x-request-id", name)
        await send(message)

    return send_on


def _too_large() -> ApiError:
    text = f"the body is over {MAX_BODY_BYTES} bytes; send smaller media, or URLs"
    return ApiError(413, text, code="request_too_large")


async def read_body(
    receive: Receive,
    take: Callable[[int], None] = lambda size: None,
    progress_timeout: float = BODY_TIMEOUT,
) -> bytes | None:
    """Return a request's body, or None if the client disconnects.

    Raises `ApiError` for a body that is too large or slower than `PROGRESS_BYTES` in
    `progress_timeout` seconds. `take`: called with the size of each part.
    """
    body = bytearray()  # not a list: parts can be single bytes
    progress, more = 0, True
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(progress_timeout) as timeout:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                take(len(part))
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
                if len(body) - progress >= PROGRESS_BYTES:
                    progress = len(body)
                    timeout.reschedule(loop.time() + progress_timeout)
                more = message.get("more_body", False)
    except TimeoutError:
        raise _too_slow(len(body), progress_timeout) from None
    return bytes(body)


def _too_slow(size: int, seconds: float) -> ApiError:
    text = f"the body did not arrive in time: after {size} bytes, less than {PROGRESS_BYTES} more "
    text += f"in {seconds:g} s; retry over a faster connection"
    return ApiError(408, text, "timeout_error", code="request_timeout")


async def _run_until_disconnect(
    app: ASGIApp, body: bytes, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run `app` in a task that is cancelled if the client disconnects first."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    is_answered = False

    async def receive_body() -> Message:
        if not messages:
            await asyncio.Event().wait()  # never ends: `wait_gone` handles disconnects
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
