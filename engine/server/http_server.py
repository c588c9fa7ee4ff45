"""The OpenAI-compatible HTTP server: Starlette's application under uvicorn, in the event loop that
gRPC is served in."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ..async_llm import AsyncLLM
from ..engine import EngineDead
from .http_error import ApiError, error_of
from .http_guard import Guard, Traffic
from .openai_routes import Routes

EMBEDDED_NAME = "octavo-embedded"
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
        self, engine: AsyncLLM, model: str, host: str, port: int, keys: Sequence[str] = ()
    ) -> None:
        """`model`: its name for clients. `port`: 0 takes a free one. `keys`: of which every request
        must bring one, where there are any."""
        self._host, self._port = host, port
        self.traffic = Traffic()
        app = make_app(Routes.of(engine, model, self.traffic), keys)
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
        self._server = _Uvicorn(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listens; gives HOST:PORT. Raises OSError when the address cannot be taken."""
        host = self._host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, self._port), family=family, backlog=2048)
        self._serving = asyncio.create_task(self._server.serve([listener]))
        await self._server.listens.wait()
        address = f"[{host}]" if ":" in host else host
        return f"{address}:{listener.getsockname()[1]}"

    async def drain(self, grace: float) -> None:
        """Takes no more requests, gives the running ones `grace` seconds, and ends."""
        self.traffic.is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.traffic.idle.wait(), grace)
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving


def make_app(routes: Routes, keys: Sequence[str]) -> ASGIApp:
    """More paths (/metrics, a page) are more of `routes`: the guard stands before all."""
    kinds = (ApiError, ValueError, EngineDead, HTTPException, Exception)
    handlers = dict.fromkeys(kinds, _tell)
    app = Starlette(routes=routes.all, exception_handlers=handlers)
    return Guard(app, routes.traffic, keys)


async def _tell(request: Request, error: Exception) -> Response:
    return error_of(error).response()


def model_name(model: str | None) -> str:
    """What clients call it: a hub id, a checkpoint's folder, or the embedded model."""
    if model is None:
        return EMBEDDED_NAME
    return Path(model).resolve().name if Path(model).is_dir() else model
