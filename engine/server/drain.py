"""In-flight calls and draining."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator

from .errors import RequestRejected

SEND_TIMEOUT = 60.0  # seconds that a client may take to read the next message
SEND_TIMEOUT_STOPPING = 3.0  # the same during shutdown


class CallTracker:
    """Tracks in-flight calls of all API servers of one event loop.

    A request counts once it has been received completely, so slow uploads do not delay `drain`.
    """

    def __init__(self) -> None:
        self.send_timeout = SEND_TIMEOUT
        self._sends: set[asyncio.Timeout] = set()
        self.num_running = 0
        self.is_draining = False
        self.idle = asyncio.Event()  # set while no call is in flight
        self.idle.set()

    def check_not_draining(self) -> None:
        """Raise `RequestRejected` if the server is draining."""
        if self.is_draining:
            raise RequestRejected(
                "UNAVAILABLE", "the server is draining; retry later or on another server"
            )

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count a call as in flight. Raises `RequestRejected` if the server is draining."""
        self.check_not_draining()
        self.num_running += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.num_running -= 1
            if self.num_running == 0:
                self.idle.set()

    def hurry(self) -> None:
        """Reject new calls and shorten the timeouts of clients that do not read, for shutdown."""
        self.is_draining = True
        self.send_timeout = SEND_TIMEOUT_STOPPING
        latest = asyncio.get_running_loop().time() + self.send_timeout
        for timeout in self._sends:
            if not timeout.expired():
                timeout.reschedule(min(timeout.when() or latest, latest))

    async def send(self, sending: Awaitable[None]) -> None:
        """Wait until the client has read a message. Raises TimeoutError after `send_timeout`."""
        async with asyncio.timeout(self.send_timeout) as timeout:
            self._sends.add(timeout)
            try:
                await sending
            finally:
                self._sends.discard(timeout)

    async def drain(self, timeout_s: float | None) -> int:
        """Reject new calls, wait for those in flight, and return how many are left."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), timeout_s)
        return self.num_running
