"""System interfaces that fetching uses: name resolution, TCP connections and TLS settings."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache


def resolve(host: str, port: int) -> list[str]:
    """Return a host's addresses from the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def dial(address: str, port: int, seconds: float) -> socket.socket:
    """Open a TCP connection."""
    return socket.create_connection((address, port), timeout=seconds)


@cache
def tls() -> ssl.SSLContext:
    """Return a TLS context that verifies host names and certificates with the system's CAs."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


@dataclass(frozen=True)
class Network:
    """System functions used by `fetch`; tests replace them."""

    resolve: Callable[[str, int], Sequence[str]] = resolve
    dial: Callable[[str, int, float], socket.socket] = dial
    tls: Callable[[], ssl.SSLContext] = tls
