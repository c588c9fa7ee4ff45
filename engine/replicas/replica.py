"""One replica: an engine with its workers, and its API servers without sockets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from ..async_llm import AsyncLLM
from ..observability.rejection_log import RejectionLog
from ..server.api_keys import read_keys
from ..server.drain import CallTracker
from ..server.grpc_api.control import ControlServicer
from ..server.grpc_api.inference import InferenceServicer
from ..server.grpc_api.server import warm_up
from ..server.http_api.openai_routes import Routes
from ..server.http_api.server import make_app
from ..server.http_api.snapshot_route import LiveView
from ..utils.logs import set_up_logs
from .calls import GrpcCall, GrpcEnd, HttpCall, HttpStart
from .held import Held
from .run_grpc import run_grpc
from .run_http import run_http


class EngineReplica:
    """The Ray Serve deployment.

    The ingress calls `http` and `grpc`. Ray Serve calls `check_health` and `record_routing_stats`
    periodically, and `__del__` once all requests have finished.
    """

    def __init__(
        self, engine: dict[str, Any], threads_per_rank: int, api_key_file: Path | None
    ) -> None:
        """Load the engine. `engine`: settings of `octavo.AsyncLLM`."""
        set_up_logs("text")
        # Ray sets this to the replica's CPUs, but each rank is a process of its own.
        os.environ["OMP_NUM_THREADS"] = str(threads_per_rank)
        self._keys = read_keys(api_key_file)
        self._engine = AsyncLLM(**engine, isolate_media=True)
        self._held = Held(self._engine.engine.scheduler, self._engine.config.block_size)
        self._engine.on_admitted = self._held.admitted
        self._work = CallTracker()
        routes = Routes.of(self._engine, self._work)
        rejections = RejectionLog(self._engine.engine.stats)
        view = LiveView(self._engine, self._keys is not None)
        self._app = make_app(routes, self._work, self._keys, rejections, view)
        control = ControlServicer(self._engine, self._work, _no_op, self._keys is not None)
        self._servicers = {
            "Inference": InferenceServicer(self._engine, self._work),
            "Control": control,
        }
        self._is_warm = False

    async def http(self, call: HttpCall) -> AsyncGenerator[HttpStart | bytes, None]:
        async with contextlib.aclosing(run_http(self._app, call)) as answer:
            async for message in self._track_caches(call, answer):
                yield message

    async def grpc(self, call: GrpcCall) -> AsyncGenerator[bytes | GrpcEnd, None]:
        servicer = self._servicers[call.service]
        async with contextlib.aclosing(run_grpc(servicer, call, self._keys)) as answer:
            async for message in self._track_caches(call, answer):
                yield message

    async def _track_caches(
        self, call: HttpCall | GrpcCall, answer: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[Any, None]:
        """Yield the response, and record what the request's prompt leaves in the caches."""
        expected = self._held.expect(call.request_id, call.prefix) if call.prefix.links else None
        try:
            async for message in answer:
                if expected is not None:
                    self._held.answered(expected)
                yield message
        finally:
            if expected is not None:
                self._held.forget(expected)

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine has failed; Serve then replaces this replica.

        The first call, before any request, runs a warm-up step.
        """
        if self._engine.failed:
            raise RuntimeError(f"the engine stopped: {self._engine.failed}")
        if not self._is_warm:
            self._is_warm = True
            await warm_up(self._engine)

    def record_routing_stats(self) -> dict[str, Any]:
        """Return what this replica has cached, for `PrefixRouter`."""
        return self._held.report()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()


async def _no_op() -> None:
    """Do nothing: Serve tracks health itself."""
