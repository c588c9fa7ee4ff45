"""HTTP/1.1 connection: uvicorn's h11 protocol with receive and send timeouts.

h11 limits the sizes of a request's head, chunk headers and trailers. httptools, which uvicorn
prefers if it is installed, does not.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from dataclasses import dataclass
from enum import Enum
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from ...observability.rejection_log import INVALID_HTTP, RECEIVE_TIMEOUT, SEND_TIMEOUT, RejectionLog
from ..connections import Slot
from ..drain import CallTracker
from .middleware import BODY_TIMEOUT, PROGRESS_BYTES

MAX_HEAD_BYTES = 32 << 10  # request line and headers; a chunk header; trailers
KEEP_ALIVE = 60  # seconds that a connection may be idle between two requests
HEAD_TIMEOUT = 20.0  # seconds from a request's first byte to the end of its head
MAX_UNREAD_BYTES = 1 << 20  # body bytes after the response, before the connection is closed
BODY_GRACE = 5.0  # seconds for the middleware to respond to a late body first


@dataclass(frozen=True)
class Timeouts:
    """Timeouts in seconds: for a request's head, and for each `PROGRESS_BYTES` of its body."""

    head: float = HEAD_TIMEOUT
    body: float = BODY_TIMEOUT


class Phase(Enum):
    HEAD = "head"  # the request's head is not complete
    BODY = "body"  # the body is not complete
    ANSWER = "answer"  # the request is complete, its response is not
    IDLE = "idle"  # between two requests; uvicorn closes the connection after `KEEP_ALIVE`


class HttpConnection(H11Protocol):
    """An HTTP connection with timeouts; implements `LimitedConnection`."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        slot: Slot,
        timeouts: Timeouts,
        work: CallTracker,
        rejections: RejectionLog,
    ) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self._slot, self._timeouts = slot, timeouts
        self._work, self._rejections = work, rejections
        self._phase, self._since = Phase.HEAD, self.loop.time()
        self._num_received = 0  # bytes since `_since`, which is the last progress for bodies
        self._num_unread = 0  # body bytes since the response was complete
        self._unsent: tuple[float, int] | None = (
            None  # since when the client has not read: time, unsent bytes
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._enter(Phase.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._slot.free()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._phase is Phase.IDLE:
            self._enter(Phase.HEAD)
        self._num_received += len(data)
        super().data_received(data)
        if self.conn.their_state is h11.SEND_BODY:
            self._receive_body(len(data))
        elif self._is_answering:
            self._enter(Phase.ANSWER)
        else:
            self._enter(Phase.HEAD)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may start the next, pipelined request
        self._num_unread = 0
        if self.conn.their_state is h11.SEND_BODY:
            self._enter(Phase.BODY)
        elif self._is_answering:
            self._enter(Phase.ANSWER)
        else:
            self._enter(Phase.HEAD if self.conn.trailing_data[0] else Phase.IDLE)

    def send_400_response(self, msg: str) -> None:
        """Respond to invalid HTTP, unless a response has been started."""
        self._rejections.add(INVALID_HTTP, self._slot.peer)
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.abort()
        self._disconnect()

    def check(self, now: float) -> None:
        """Close the connection if one of its timeouts has passed."""
        if self._is_unread(now):
            self._rejections.add(SEND_TIMEOUT, self._slot.peer)
            self.abort()
        elif not self.transport.is_closing() and self._is_late(now):
            self._rejections.add(RECEIVE_TIMEOUT, self._slot.peer)
            self._disconnect()
            self.transport.close()

    def end(self) -> None:
        """Close the connection for shutdown, after the response in progress if there is one.

        A request with an incomplete body gets no response.
        """
        if self._phase is Phase.ANSWER:
            self.cycle.keep_alive = False
        else:
            self._disconnect()
            self.transport.close()

    def abort(self) -> None:
        self._disconnect()
        self.transport.abort()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _enter(self, phase: Phase) -> None:
        if phase is not self._phase:
            self._phase, self._since, self._num_received = phase, self.loop.time(), 0
            self._slot.set_waiting(phase is not Phase.ANSWER)

    def _receive_body(self, size: int) -> None:
        """Track the arrival of `size` bytes of a body."""
        if self._phase is not Phase.BODY:
            self._enter(Phase.BODY)
        elif self._num_received >= PROGRESS_BYTES:
            self._since, self._num_received = self.loop.time(), 0
            self._slot.set_waiting(True)
        if not self._is_answering:  # rejected before its body was complete
            self._num_unread += size
            if self._num_unread > MAX_UNREAD_BYTES:
                self.transport.close()

    def _is_late(self, now: float) -> bool:
        """Return whether the head or the next part of the body is overdue."""
        if self._phase is Phase.HEAD:
            return now - self._since > self._timeouts.head
        if self._phase is not Phase.BODY:
            return False
        if self.flow.read_paused:  # the server has paused reading
            self._since, self._num_received = now, 0
        return now - self._since > self._timeouts.body + BODY_GRACE

    def _is_unread(self, now: float) -> bool:
        """Return whether the client reads its response too slowly."""
        num_bytes = self.transport.get_write_buffer_size()
        num_bytes += num_bytes and unsent_in_kernel(self.transport)
        if num_bytes == 0 or not (self.flow.write_paused or self.transport.is_closing()):
            self._unsent = None
            return False
        since, before = self._unsent or (now, num_bytes + PROGRESS_BYTES)
        if self._unsent is None or before - num_bytes >= PROGRESS_BYTES:
            self._unsent = (now, num_bytes)
            return False
        return now - since > self._work.send_timeout

    def _disconnect(self) -> None:
        """Report to the application that the client has disconnected."""
        if self._is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.flow.resume_writing()

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing, because any client can cause it. The request is served as HTTP/1.1."""


def unsent_in_kernel(transport: asyncio.Transport) -> int:
    """Return how many bytes of a socket's send buffer the client has not acknowledged.

    asyncio's buffer alone does not show progress: the kernel accepts new bytes only after the
    client has read megabytes, which takes a slow client minutes.
    """
    try:
        file = transport.get_extra_info("socket").fileno()
        return int.from_bytes(fcntl.ioctl(file, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (OSError, ValueError, AttributeError):  # ValueError: it is closed
        return 0


def http_config(app: Any) -> uvicorn.Config:
    """Return uvicorn's settings. Only errors are logged: clients can cause all other messages."""
    config = uvicorn.Config(
        app,
        http=H11Protocol,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
    )
    config.load()
    return config
