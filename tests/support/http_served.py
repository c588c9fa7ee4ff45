"""An engine with both API servers in the test's process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.benchmarks.fakes.tiny_server import Served
from octavo.engine.server.api_keys import ApiKeys
from octavo.engine.server.drain import CallTracker
from octavo.engine.server.http_api.server import HttpServer


class HttpServed(Served):
    """`Served` with an HTTP server at `url`."""

    def __init__(self, checkpoint: Path, keys: Sequence[str] = (), **settings: Any) -> None:
        """Start the servers. `keys`: API keys of the HTTP server; none: no authentication."""
        self.keys = ApiKeys(keys) if keys else None
        super().__init__(checkpoint, **settings)

    async def _start(self) -> None:
        await super()._start()
        self.http = HttpServer("127.0.0.1", 0, self.keys)
        self.url = f"http://{await self.http.start(self.engine, CallTracker())}"

    def close(self) -> None:
        self.run(self.http.drain(1.0))
        super().close()
