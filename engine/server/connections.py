"""Accept a server's TCP connections, with limits on their number and waiting time.

asyncio's own accept loop has no limits, and without free descriptors it logs thousands of lines per
second. A connection *waits* while it has no complete request: during the TLS handshake, while the
head or body is incomplete, or when idle between two requests. When there are too many connections,
those that have waited longest are closed. Connections with a complete request are never closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any, Protocol

from ..observability.rejection_log import (
    ACCEPT_ERROR,
    CONNECTION_LIMIT,
    TLS_HANDSHAKE,
    RejectionLog,
)

log = logging.getLogger("octavo.server")

# Errors of `accept` that mean: no descriptors or memory.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

MAX_CONNECTIONS = 8192
PER_PEER_SHARE = 4  # a peer may have 1/4 of all connections waiting
MIN_WAIT = 1.0  # seconds; newer connections are not closed to accept others
HANDSHAKE_TIMEOUT = 20.0  # seconds for the TLS handshake
CHECK_INTERVAL = 1.0  # seconds between two checks of all timeouts
ACCEPT_RETRY_DELAY = 0.05  # seconds until the next attempt after a failed accept
ACCEPTS_PER_WAKE = 64

MIN_DESCRIPTORS = 32  # kept free for files, workers and media decoders
MIN_CONNECTIONS = 8


@dataclass(frozen=True)
class ConnectionLimits:
    """Connection limits of one server."""

    total: int = MAX_CONNECTIONS

    @property
    def waiting_per_peer(self) -> int:
        return max(1, self.total // PER_PEER_SHARE)


class LimitedConnection(Protocol):
    """Interface that an `Acceptor` needs of its connections' protocol."""

    def check(self, now: float) -> None:
        """Close the connection if one of its timeouts has passed. Called every `CHECK_INTERVAL`."""

    def abort(self) -> None:
        """Close the connection at once."""


class Slot:
    """One accepted connection in its acceptor's tables."""

    def __init__(self, acceptor: Acceptor, peer: str, now: float) -> None:
        self._acceptor, self.peer, self.waiting_since = acceptor, peer, now
        self.connection: LimitedConnection | None = None  # None until the TLS handshake is done
        self.opening: asyncio.Task[None] | None = None

    def set_waiting(self, is_waiting: bool) -> None:
        """Set whether the connection waits. Each call restarts the waiting time.

        Also called after progress of an upload.
        """
        self._acceptor.set_waiting(self, is_waiting)

    def free(self) -> None:
        """Remove the connection, which is closed, from the tables."""
        self._acceptor.remove(self)

    def abort(self) -> None:
        if self.connection is not None:
            self.connection.abort()
        elif self.opening is not None:
            self.opening.cancel()


class Acceptor:
    """Accepts connections from one listening socket, which it owns. Not thread-safe."""

    def __init__(
        self,
        listener: socket.socket,
        connect: Callable[[Slot], Any],
        limits: ConnectionLimits,
        rejections: RejectionLog,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Start accepting. `connect` returns a new connection's protocol, a `LimitedConnection`."""
        self._listener, self._connect = listener, connect
        self._limits, self._rejections, self._tls = limits, rejections, tls
        self._slots: set[Slot] = set()
        self._waiting: dict[Slot, None] = {}  # longest waiting first, also per peer
        self._waiting_of: dict[str, dict[Slot, None]] = {}
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._is_closed = False
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept_some)
        self._checks = self._loop.create_task(self._check_forever())

    def __len__(self) -> int:
        return len(self._slots)

    def close(self) -> None:
        """Accept no more connections. Open connections stay open."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()

    async def close_all(self, grace: float) -> None:
        """Close the listener, then abort connections still open after `grace` seconds."""
        self.close()
        end = self._loop.time() + grace
        while self._slots and self._loop.time() < end:
            await asyncio.sleep(0.02)
        for slot in list(self._slots):
            slot.abort()
        self._checks.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._checks

    def set_waiting(self, slot: Slot, is_waiting: bool) -> None:
        if slot not in self._slots:
            return
        self._stop_waiting(slot)
        if is_waiting:
            slot.waiting_since = self._loop.time()
            self._waiting[slot] = None
            self._waiting_of.setdefault(slot.peer, {})[slot] = None

    def remove(self, slot: Slot) -> None:
        self._stop_waiting(slot)
        self._slots.discard(slot)

    def _stop_waiting(self, slot: Slot) -> None:
        if slot not in self._waiting:
            return
        of_peer = self._waiting_of[slot.peer]
        del self._waiting[slot], of_peer[slot]
        if not of_peer:
            del self._waiting_of[slot.peer]

    def _accept_some(self) -> None:
        for _ in range(ACCEPTS_PER_WAKE):
            if not self._has_capacity():
                self._pause()
                return
            try:
                connection, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # the client has disconnected already
                continue
            except OSError as error:
                if error.errno not in EXHAUSTED:  # of one connection, such as a firewall's EPERM
                    continue
                self._rejections.add(ACCEPT_ERROR, "the listening socket")
                self._close_longest(self._waiting)
                self._pause()
                return
            self._open(connection, peer_of(address))

    def _has_capacity(self) -> bool:
        if len(self._slots) < self._limits.total:
            return True
        return self._close_longest(self._waiting)

    def _close_longest(self, waiting: dict[Slot, None]) -> bool:
        """Close the connection that has waited longest, if for at least `MIN_WAIT`."""
        slot = next(iter(waiting), None)
        if slot is None or self._loop.time() - slot.waiting_since < MIN_WAIT:
            return False
        self._rejections.add(CONNECTION_LIMIT, slot.peer)
        self.remove(slot)
        slot.abort()
        return True

    def _pause(self) -> None:
        """Stop accepting for a short time. Clients wait in the listener's backlog meanwhile."""
        self._loop.remove_reader(self._listener)
        self._retry = self._loop.call_later(ACCEPT_RETRY_DELAY, self._resume)

    def _resume(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listener, self._accept_some)

    def _open(self, connection: socket.socket, peer: str) -> None:
        of_peer = self._waiting_of.get(peer, {})
        if len(of_peer) >= self._limits.waiting_per_peer:
            self._close_longest(of_peer)
        slot = Slot(self, peer, self._loop.time())
        self._slots.add(slot)
        self.set_waiting(slot, True)
        slot.opening = self._loop.create_task(self._connect_slot(connection, slot))

    async def _connect_slot(self, connection: socket.socket, slot: Slot) -> None:
        def connect() -> Any:
            return self._connect(slot)

        more = {"ssl_handshake_timeout": HANDSHAKE_TIMEOUT} if self._tls else {}
        connection.setblocking(False)
        try:
            _, slot.connection = await self._loop.connect_accepted_socket(
                connect, connection, ssl=self._tls, **more
            )
        except asyncio.CancelledError:
            self.remove(slot)
            connection.close()
            raise
        except (OSError, ssl.SSLError):  # includes timeouts
            self._rejections.add(TLS_HANDSHAKE, slot.peer)
            self.remove(slot)
            connection.close()

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL)
            now = self._loop.time()
            for slot in list(self._slots):
                if slot.connection is not None:
                    self._check(slot, slot.connection, now)

    def _check(self, slot: Slot, connection: LimitedConnection, now: float) -> None:
        try:
            connection.check(now)
        except Exception:  # of one connection: the others' timeouts go on
            log.exception("a connection is closed: its timeouts cannot be checked")
            self.remove(slot)
            slot.abort()


def peer_of(address: tuple[Any, ...]) -> str:
    """Return the peer for per-peer limits: an IPv4 address or an IPv6 /64 network."""
    try:
        ip = ip_address(str(address[0]).partition("%")[0])
    except (ValueError, IndexError):
        return "unknown"
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    if isinstance(ip, IPv6Address) and not ip.is_loopback:
        return str(IPv6Address(int(ip) >> 64 << 64)) + "/64"
    return str(ip)


def connections_that_fit() -> int:
    """Return the maximum connections of each of two servers, from the free file descriptors."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        num_open = len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):
        return MAX_CONNECTIONS
    if limit < 0:  # RLIM_INFINITY
        return MAX_CONNECTIONS
    free = (limit - num_open - max(MIN_DESCRIPTORS, limit // 8)) // 2
    return max(MIN_CONNECTIONS, min(MAX_CONNECTIONS, free))


def raise_descriptor_limit(wanted: int = 4 * MAX_CONNECTIONS) -> None:
    """Raise the soft limit on open files to `wanted`, or to the hard limit if that is lower."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = wanted if hard < 0 else min(wanted, hard)
        if 0 <= soft < limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (ImportError, OSError, ValueError):  # some systems do not allow it
        return
