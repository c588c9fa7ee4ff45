"""Serve Prometheus metrics on a separate port, with one thread for all connections.

Uses no HTTP library, because the extra octavo[http] may not be installed. Each connection serves
one request.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from wsgiref.types import StartResponse, WSGIApplication

from prometheus_client import CollectorRegistry, make_wsgi_app

from ..observability.prometheus import metrics_registry
from ..observability.rejection_log import INVALID_HTTP, RECEIVE_TIMEOUT, SEND_TIMEOUT, RejectionLog
from ..observability.stats import EngineStats
from .connections import Acceptor, ConnectionLimits, Slot, connections_that_fit

MAX_CONNECTIONS = 64
MAX_HEAD_BYTES = 16 << 10
HEAD_TIMEOUT = 10.0  # seconds from accepting a connection to the end of its request's head
SEND_TIMEOUT_S = 30.0  # seconds from then until the response is sent


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError:
        text = "the address is in use or does not belong to this machine"
        raise OSError(f"--metrics-port {port}: {host}:{port}: {text}") from None


class MetricsServer:
    """Metrics server: a thread with an event loop that runs until the context exits."""

    def __init__(
        self, stats: EngineStats, registry: CollectorRegistry, host: str, port: int
    ) -> None:
        """Start the thread. Raises OSError if the address is in use."""
        self._listener = _listen(host, port)
        port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._app = make_wsgi_app(registry)
        self._rejections = RejectionLog(stats)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        limits = ConnectionLimits(min(MAX_CONNECTIONS, connections_that_fit()))
        acceptor = Acceptor(self._listener, self._connect, limits, self._rejections)
        await self._stop.wait()
        await acceptor.close_all(0.0)
        await asyncio.sleep(0)  # sockets close in the loop's next iteration

    def _connect(self, slot: Slot) -> _MetricsConnection:
        return _MetricsConnection(slot, self._app, self._rejections)


class _MetricsConnection(asyncio.Protocol):
    """A metrics connection; implements `LimitedConnection`."""

    def __init__(self, slot: Slot, app: WSGIApplication, rejections: RejectionLog) -> None:
        self._slot, self._app, self._rejections = slot, app, rejections
        self._head = bytearray()
        self._since = asyncio.get_running_loop().time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._slot.free()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end >= 0:
            self._since = asyncio.get_running_loop().time()
            self._answer(bytes(self._head[:end]).decode("latin-1"))
        elif len(self._head) > MAX_HEAD_BYTES:
            self._reject("431 Request Header Fields Too Large")

    def check(self, now: float) -> None:
        is_sending = self._transport.is_closing()
        if now - self._since > (SEND_TIMEOUT_S if is_sending else HEAD_TIMEOUT):
            reason = SEND_TIMEOUT if is_sending else RECEIVE_TIMEOUT
            self._rejections.add(reason, self._slot.peer)
            self.abort()

    def abort(self) -> None:
        self._transport.abort()

    def _answer(self, head: str) -> None:
        lines = head.split("\r\n")
        method, _, rest = lines[0].partition(" ")
        target, _, version = rest.partition(" ")
        if not method.isalpha() or not target or not version.startswith("HTTP/1."):
            self._reject("400 Bad Request")
            return
        try:
            status, headers, body = call_app(self._app, method, target, lines[1:])
        except (TypeError, ValueError):  # prometheus_client, of a malformed Accept header
            self._reject("400 Bad Request")
            return
        self._write(status, headers, b"" if method == "HEAD" else body, len(body))

    def _reject(self, status: str) -> None:
        self._rejections.add(INVALID_HTTP, self._slot.peer)
        self._write(status, [], b"", 0)

    def _write(self, status: str, headers: list[tuple[str, str]], body: bytes, size: int) -> None:
        more = [("Content-Length", str(size)), ("Connection", "close")]
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in (*headers, *more))]
        self._transport.write("\r\n".join((*lines, "", "")).encode("latin-1") + body)
        self._transport.close()


def call_app(
    app: WSGIApplication, method: str, target: str, lines: list[str]
) -> tuple[str, list[tuple[str, str]], bytes]:
    """Call a WSGI application and return status, headers and body. `lines`: header lines."""
    path, _, query = target.partition("?")
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
    for line in lines:
        name, _, value = line.partition(":")
        environ[f"HTTP_{name.strip().upper().replace('-', '_')}"] = value.strip()
    found: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], *_: Any) -> Callable[..., Any]:
        found.append((status, headers))
        return lambda data: None

    body = b"".join(app(environ, cast(StartResponse, start_response)))
    status, headers = found[0]
    return status, headers, body


@contextmanager
def serving_metrics(stats: EngineStats, host: str, port: int | None) -> Iterator[str]:
    """Serve the metrics at `port` on a thread, and yield HOST:PORT.

    Port 0 selects a free port; None disables the server and yields "". Raises OSError if the
    address is in use.
    """
    if port is None:
        yield ""
        return
    with MetricsServer(stats, metrics_registry(stats), host, port) as server:
        yield server.address
