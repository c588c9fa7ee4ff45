"""Calls that run, and whether new ones are taken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator

from .errors import RequestRejected

SEND_TIMEOUT = 60.0  # seconds that a client may read nothing of its response
SEND_TIMEOUT_STOPPING = 3.0  # the same while the server stops


class CallTracker:
    """Tracks calls in flight, of one event loop and all API servers in it. A request counts once it
    has been received completely: one that is still being sent does not delay `drain`."""

    def __init__(self) -> None:
        self.send_timeout = SEND_TIMEOUT
        self._sends: set[asyncio.Timeout] = set()
        self.num_running = 0
        self.is_draining = False
        self.idle = asyncio.Event()  # no call runs
        self.idle.set()

    def check_not_draining(self) -> None:
        """Raise `RequestRejected` where new calls are not taken any more."""
        if self.is_draining:
            raise RequestRejected(
                "UNAVAILABLE", "the server is being drained; ask another, or later"
            )

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """While a call runs. Raises `RequestRejected` where none is taken any more."""
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
        """The server stops: do not wait long for clients that do not read."""
        self.is_draining = True
        self.send_timeout = SEND_TIMEOUT_STOPPING
        latest = asyncio.get_running_loop().time() + self.send_timeout
        for timeout in self._sends:
            if not timeout.expired():
                timeout.reschedule(min(timeout.when() or latest, latest))

    async def send(self, sending: Awaitable[None]) -> None:
        """Wait until the client has taken a message. Raises TimeoutError after `send_timeout`."""
        async with asyncio.timeout(self.send_timeout) as timeout:
            self._sends.add(timeout)
            try:
                await sending
            finally:
                self._sends.discard(timeout)

    async def drain(self, timeout_s: float | None) -> int:
        """Takes no more calls, and waits for those that run: how many are left."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), timeout_s)
        return self.num_running
