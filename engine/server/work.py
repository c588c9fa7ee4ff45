"""Calls that run, and whether new ones are taken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from .errors import Refused


class Work:
    """Of one event loop; shared by all doors of a server."""

    def __init__(self) -> None:
        self.num_running = 0
        self.is_draining = False
        self.idle = asyncio.Event()  # no call runs
        self.idle.set()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """While a call runs. Raises `Refused` where none is taken any more."""
        if self.is_draining:
            raise Refused("UNAVAILABLE", "the server is being drained; ask another, or later")
        self.num_running += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.num_running -= 1
            if self.num_running == 0:
                self.idle.set()

    async def drain(self, timeout_s: float | None) -> int:
        """Takes no more calls, and waits for those that run: how many are left."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), timeout_s)
        return self.num_running
