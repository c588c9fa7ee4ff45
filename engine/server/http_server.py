"""The OpenAI-compatible HTTP server: Starlette's application under uvicorn, in the event loop that
gRPC is served in."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ...scheduler.admission import AdmissionError
from ..async_llm import AsyncLLM
from ..engine import DuplicateRequest, EngineDead
from ..input_error import InputError
from ..tls import TlsFiles
from .errors import Refused
from .http_error import ApiError, error_of, misrouted
from .http_guard import Guard
from .http_live import LiveView
from .http_page import page_routes
from .http_tls import server_context
from .key_refusals import KeyRefusals
from .keys import ApiKeys
from .openai_routes import Routes
from .work import Work

KEEP_ALIVE = 60  # seconds that a connection may rest between two requests


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the program, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()


class HttpServer:
    """The door of one engine: `start`, then `drain`."""

    def __init__(
        self, host: str, port: int, keys: ApiKeys | None = None, tls: TlsFiles | None = None
    ) -> None:
        """`port`: 0 takes a free one. `keys`: of which every request must bring one."""
        self._host, self._port, self._keys, self._tls = host, port, keys, tls
        self._work = Work()

    async def start(self, engine: AsyncLLM, work: Work) -> str:
        """Listens; gives HOST:PORT. Raises OSError when the address cannot be taken. `work`: of
        all doors."""
        self._work, host = work, self._host
        asks_who = self._keys is not None or bool(self._tls and self._tls.client_ca)
        view, refusals = LiveView(engine, asks_who), KeyRefusals(engine.engine.stats)
        app = make_app(Routes.of(engine, work), work, self._keys, refusals, view)
        config = _config(app, self._tls)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, self._port), family=family, backlog=2048)
        self._server = _Uvicorn(config)
        self._serving = asyncio.create_task(self._server.serve([listener]))
        await self._server.listens.wait()
        address = f"[{host}]" if ":" in host else host
        return f"{address}:{listener.getsockname()[1]}"

    async def drain(self, grace: float) -> None:
        """Takes no more requests, gives the running ones `grace` seconds, and ends."""
        await self._work.drain(grace)
        self._server.should_exit = True
        await self._serving


def _config(app: ASGIApp, tls: TlsFiles | None) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
    )
    config.load()
    config.ssl = server_context(tls) if tls else None
    return config


def make_app(
    routes: Routes, work: Work, keys: ApiKeys | None, refusals: KeyRefusals, view: LiveView
) -> ASGIApp:
    """The guard stands before all paths."""
    kinds = (ApiError, InputError, AdmissionError, DuplicateRequest, EngineDead, HTTPException)
    handlers = dict.fromkeys((*kinds, Refused, Exception), _tell)
    paths = [*routes.all, *page_routes(), *view.routes]
    app = Starlette(routes=paths, exception_handlers=handlers)
    return Guard(app, work, keys, refusals, routes.engine.config.max_queue_bytes)


async def _tell(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return error_of(error).response()
    paths = [route.path for route in request.app.routes]
    answer = misrouted(error, request.method, request.url.path, paths).response()
    answer.headers.update(error.headers or {})
    return answer
