"""Errors of one connection affect no other connection of a listener."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from octavo.engine.observability.rejection_log import RejectionLog
from octavo.engine.server import connections
from octavo.engine.server.connections import Acceptor, ConnectionLimits
from octavo.engine.server.metrics_server import MetricsServer

STATS: Any = SimpleNamespace(
    closed_connections=Counter(), count_closed_connection=lambda reason: None
)


class Connection(asyncio.Protocol):
    """A connection that counts its checks; those of `failing` raise."""

    failing = True

    def __init__(self) -> None:
        self.num_checks, self.is_aborted, self.fails = 0, False, Connection.failing
        Connection.failing = False

    def check(self, now: float) -> None:
        self.num_checks += 1
        if self.fails:
            raise RuntimeError("its check failed")

    def abort(self) -> None:
        self.is_aborted = True


def listener() -> socket.socket:
    made = socket.create_server(("127.0.0.1", 0))
    made.setblocking(False)
    return made


def test_a_check_that_raises_closes_its_connection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CHECK_INTERVAL", 0.02)
    made: list[Connection] = []

    def connect(slot: Any) -> Connection:
        made.append(Connection())
        return made[-1]

    async def run() -> None:
        acceptor = Acceptor(listener(), connect, ConnectionLimits(), RejectionLog(STATS))
        address = acceptor._listener.getsockname()
        clients = [await asyncio.open_connection(*address) for _ in range(2)]
        async with asyncio.timeout(20):
            while len(made) < 2 or made[1].num_checks < 3:
                await asyncio.sleep(0.01)
        assert made[0].is_aborted and not made[1].is_aborted and made[0].num_checks == 1
        for _, writer in clients:
            writer.close()
        await acceptor.close_all(0)

    Connection.failing = True
    asyncio.run(run())


@pytest.mark.parametrize(("number", "closes"), [(errno.EPERM, False), (errno.EMFILE, True)])
def test_only_exhausted_descriptors_close_a_waiting_connection(number: int, closes: bool) -> None:
    class Failing:
        """A listening socket whose `accept` fails once."""

        def __init__(self, inner: socket.socket) -> None:
            self.inner, self.errors = inner, [OSError(number, "failed")]

        def accept(self) -> Any:
            if self.errors:
                raise self.errors.pop()
            return self.inner.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    async def run() -> None:
        made: Any = Failing(listener())
        acceptor = Acceptor(
            made, lambda slot: Connection(), ConnectionLimits(), RejectionLog(STATS)
        )
        closed: list[Any] = []
        acceptor._close_longest = lambda waiting: bool(closed.append(waiting))  # type: ignore
        _, writer = await asyncio.open_connection(*made.getsockname())
        async with asyncio.timeout(20):
            while not len(acceptor):
                await asyncio.sleep(0.01)
        assert bool(closed) is closes
        writer.close()
        await acceptor.close_all(0)

    asyncio.run(run())


@pytest.mark.parametrize(
    "accept", ["text/plain; version=x", "application/openmetrics-text;version=a.b"]
)
def test_a_malformed_accept_header_is_a_bad_request(accept: str) -> None:
    with MetricsServer(STATS, CollectorRegistry(), "127.0.0.1", 0) as server:
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as client:
            client.sendall(f"GET /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode())
            answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 ")), answer
