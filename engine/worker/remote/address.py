"""Parse addresses of remote workers, and find the network interface that leads to a peer."""

from __future__ import annotations

import fcntl
import ipaddress
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ...errors import ConfigError

ADDRESS = re.compile(r"(\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})")
SIOCGIFADDR = 0x8915  # Linux ioctl: the IPv4 address of an interface


@dataclass(frozen=True)
class Address:
    """Host and port of a worker."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, name: str) -> Address:
        """Parse HOST:PORT or [IPv6]:PORT. Raises `ConfigError` for the setting `name`."""
        match = ADDRESS.fullmatch(text.strip())
        if match is None or int(match["port"]) > 65535:
            port = ", with a port of at most 65535" if match else ""
            raise ConfigError(f"{name}={text!r}: must be HOST:PORT, such as 10.0.0.2:7000{port}")
        return cls(match["six"] or match["host"], int(match["port"]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect. Of host names, only localhost counts."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def interface_towards(peer: str) -> str | None:
    """Return the name of the network interface that leads to a peer; None if it is unknown.

    `peer` is in gRPC's format: `ipv4:10.0.0.1:5000`.
    """
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    family = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}.get(kind)
    if family is None:
        return None
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing; the kernel only selects the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    return _with_ipv4(own) if family == socket.AF_INET else _with_ipv6(own)


def _with_ipv4(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]
            except OSError:  # the interface has no IPv4 address
                continue
            if socket.inet_ntoa(found) == address:
                return name
    return None


def _with_ipv6(address: str) -> str | None:
    wanted = ipaddress.ip_address(address.partition("%")[0]).packed.hex()
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[-1] for line in lines if line.startswith(wanted)), None)
