"""OpenAI-compatible HTTP server: a Starlette application on uvicorn, in gRPC's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from ...async_llm import AsyncLLM
from ...errors import RequestException
from ...observability.rejection_log import RejectionLog
from ...utils.tls import TlsFiles
from ..api_keys import ApiKeys
from ..connections import Acceptor, ConnectionLimits, Slot, connections_that_fit
from ..drain import CallTracker
from .connection import HttpConnection, Timeouts, http_config
from .errors import ApiError, error_of, misrouted
from .middleware import BODY_TIMEOUT, AuthMiddleware
from .openai_routes import Routes
from .page_route import page_routes
from .snapshot_route import LiveView
from .tls import server_context

CLOSE_GRACE = 1.0  # seconds for connections to send the rest of their responses


class _Uvicorn(uvicorn.Server):
    """A uvicorn server that does not handle signals and limits connections."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        accept: Callable[[socket.socket, Callable[[Slot], HttpConnection]], Acceptor],
        connect: Callable[[ServerState, Slot], HttpConnection],
    ) -> None:
        super().__init__(config)
        self.listens = asyncio.Event()
        self._listener, self._accept, self._connect = listener, accept, connect

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        connect = functools.partial(self._connect, self.server_state)
        self._acceptor = self._accept(self._listener, connect)
        self.started = True
        self.listens.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close connections without a response in progress; after `CLOSE_GRACE`, close all."""
        self._acceptor.close()
        for connection in list(self.server_state.connections):
            cast(HttpConnection, connection).end()
        await self._acceptor.close_all(CLOSE_GRACE)
        if self.server_state.tasks:
            await asyncio.wait(list(self.server_state.tasks), timeout=CLOSE_GRACE)


class HttpServer:
    """HTTP server of one engine. Call `start`, then `drain`."""

    def __init__(
        self,
        host: str,
        port: int,
        keys: ApiKeys | None = None,
        tls: TlsFiles | None = None,
        timeouts: Timeouts | None = None,
        max_connections: int | None = None,
    ) -> None:
        """Configure the server. `port`: 0 selects a free port. `keys`: None disables API keys."""
        self._host, self._port, self._keys, self._tls = host, port, keys, tls
        self._timeouts, self._max_connections = timeouts or Timeouts(), max_connections
        self._work = CallTracker()

    async def start(self, engine: AsyncLLM, work: CallTracker) -> str:
        """Start listening and return HOST:PORT. Raises OSError if the address cannot be bound.

        `work`: the call tracker that all API servers share.
        """
        self._work, host = work, self._host
        is_known = self._keys is not None or bool(self._tls and self._tls.client_ca)
        view = LiveView(engine, is_known)
        self._rejections = RejectionLog(engine.engine.stats)
        app = make_app(
            Routes.of(engine, work), work, self._keys, self._rejections, view, self._timeouts.body
        )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, self._port), family=family, backlog=2048)
        self._config = http_config(app)
        self._server = _Uvicorn(self._config, listener, self._accept, self._connect)
        address = f"[{host}]" if ":" in host else host
        name = f"{address}:{listener.getsockname()[1]}"
        self._serving = asyncio.create_task(self._server.serve())
        await self._server.listens.wait()
        return name

    def _accept(
        self, listener: socket.socket, connect: Callable[[Slot], HttpConnection]
    ) -> Acceptor:
        limits = ConnectionLimits(self._max_connections or connections_that_fit())
        tls = server_context(self._tls) if self._tls else None
        return Acceptor(listener, connect, limits, self._rejections, tls)

    def _connect(self, state: ServerState, slot: Slot) -> HttpConnection:
        return HttpConnection(
            self._config, state, slot, self._timeouts, self._work, self._rejections
        )

    async def drain(self, grace: float) -> None:
        """Reject new requests, wait `grace` seconds for running ones, and stop."""
        await self._work.drain(grace)
        self._server.should_exit = True
        await self._serving


def make_app(
    routes: Routes,
    work: CallTracker,
    keys: ApiKeys | None,
    rejections: RejectionLog,
    view: LiveView,
    body_timeout: float = BODY_TIMEOUT,
) -> ASGIApp:
    """Build the application: all routes behind `AuthMiddleware`."""
    kinds = (ApiError, RequestException, HTTPException, Exception)
    handlers = dict.fromkeys(kinds, _handle_error)
    paths = [*routes.all, *page_routes(), *view.routes]
    app = Starlette(routes=paths, exception_handlers=handlers)
    max_bytes = routes.engine.config.max_queue_bytes
    return AuthMiddleware(app, work, keys, rejections, max_bytes, body_timeout)


async def _handle_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return error_of(error).response()
    paths = [route.path for route in request.app.routes]
    answer = misrouted(error, request.method, request.url.path, paths).response()
    answer.headers.update(error.headers or {})
    return answer
