"""Send random bytes to a running server's ports, and stall connections, without an API key.

    python -m octavo.benchmarks.fuzz.connections --http 127.0.0.1:8000 --seeds 0:2000

A seed determines one connection: its data (valid and invalid HTTP/1.1, HTTP/2, TLS, noise), how the
data is split, and how the connection ends: a clean close, a reset, or staying open and silent. The
server must still answer afterwards. `tests/server/test_connections.py` also bounds its
descriptors, threads and log.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import struct
from dataclasses import dataclass
from typing import Annotated

import typer

PATHS = ("/health", "/v1/chat/completions", "/v1/models", "/", "/metrics", "*", "http://a/health")
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "CONNECT", "PUT", "get", "PRI", "G\x00T")
VERSIONS = ("HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", "")
HEADERS = (
    "Host: localhost",
    "Content-Type: application/json",
    "Content-Length: 5",
    "Content-Length: 99999999999999999999",
    "Content-Length: -1",
    "Content-Length: 300000000",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Connection: Upgrade",
    "Connection: close",
    "Upgrade: websocket",
    "Upgrade: h2c",
    "Expect: 100-continue",
    "Authorization: Bearer wrong-key-0001",
    "X-Request-Id: " + "x" * 300,
    "X-Long: " + "y" * 40_000,
    "X-Bad\x00: z",
    ": no name",
    "no colon",
    " continued",
)
BODIES = (
    b"",
    b"hello",
    b"{}",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"5;" + b"e" * 40_000 + b"\r\nhello\r\n",
    b"ffffffffffffffffff\r\n",
    b"zz\r\nhello",
    b"1\r\nab\r\n",
    b"0\r\nTrailer: x\r\n\r\n",
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@dataclass(frozen=True)
class Attempt:
    """One connection: the chunks sent, and how it ends ("close", "reset" or "stall")."""

    pieces: tuple[bytes, ...]
    end: str


def draw(seed: int) -> Attempt:
    rng = random.Random(seed)
    kind = rng.choices(("http", "http2", "tls", "noise"), (8, 2, 1, 1))[0]
    if kind == "http":
        data = b"".join(_request(rng) for _ in range(rng.choice((1, 1, 1, 2, 5))))
    elif kind == "http2":
        data = PREFACE + rng.choice((b"", SETTINGS, SETTINGS + rng.randbytes(60)))
    elif kind == "tls":
        data = b"\x16\x03\x01" + rng.randbytes(rng.randrange(200))
    else:
        data = rng.randbytes(rng.randrange(2000))
    if rng.random() < 0.3:
        data = data[: rng.randrange(len(data) + 1)]
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 1, 3))))
    bounds = [0, *cuts, len(data)]
    pieces = tuple(data[a:b] for a, b in itertools.pairwise(bounds))
    return Attempt(pieces, rng.choice(("close", "reset", "stall")))


def _request(rng: random.Random) -> bytes:
    line = f"{rng.choice(METHODS[:3] if rng.random() < 0.7 else METHODS)} {rng.choice(PATHS)} "
    line += rng.choice(VERSIONS[:1] if rng.random() < 0.8 else VERSIONS)
    headers = rng.sample(HEADERS, rng.randrange(6))
    if rng.random() < 0.7:
        headers.insert(0, HEADERS[0])
    return "\r\n".join((line, *headers, "", "")).encode("latin-1") + rng.choice(BODIES)


def play(attempt: Attempt, address: tuple[str, int]) -> socket.socket | None:
    """Open a connection and send the attempt; return the socket if it stays open."""
    connection = socket.create_connection(address, timeout=10)
    with contextlib.suppress(OSError):  # the server may have closed it already
        for piece in attempt.pieces:
            connection.sendall(piece)
        if attempt.end == "close":
            connection.settimeout(0.05)
            connection.recv(1 << 16)
    if attempt.end == "stall":
        return connection
    if attempt.end == "reset":
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()
    return None


def play_all(seeds: range, addresses: list[tuple[str, int]], max_stalled: int = 200) -> None:
    """Play each seed on each address; keep the latest `max_stalled` stalled connections open."""
    stalled: list[socket.socket] = []
    try:
        for seed in seeds:
            for address in addresses:
                kept = play(draw(seed), address)
                stalled.extend([kept] if kept is not None else [])
                if len(stalled) > max_stalled:
                    stalled.pop(0).close()
    finally:
        for connection in stalled:
            connection.close()


def is_healthy(address: tuple[str, int]) -> bool:
    """Return whether the HTTP server answers."""
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def parse_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def main(
    http: Annotated[str, typer.Option(help="HOST:PORT of the server's HTTP API.")],
    other: Annotated[
        list[str] | None,
        typer.Option(help="HOST:PORT of the gRPC or metrics server; may be repeated."),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="FIRST:END")] = "0:1000",
) -> None:
    """Play seeds against a server; exit with 1 if it does not answer afterwards."""
    first, _, end = seeds.partition(":")
    addresses = [parse_address(each) for each in (http, *(other or ()))]
    play_all(range(int(first), int(end)), addresses)
    if not is_healthy(addresses[0]):
        typer.echo("the server does not answer", err=True)
        raise typer.Exit(1)
    count = f"{int(end) - int(first)} connections to each of {len(addresses)} ports"
    typer.echo(f"{count}: the server still answers")


if __name__ == "__main__":
    typer.run(main)
