"""URLs: read once, by one parser. What is checked here is what is resolved, dialled and asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from ....scheduler.params import truncated_repr

PORTS = {"http": 80, "https": 443}
MAX_CHARACTERS = 8000
OTHER_WAY = "send the bytes, or a data URI"

# Parsers disagree about these; a URL writes them as %20, %5C and so on.
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True)
class Target:
    """Where one request goes."""

    scheme: str
    host: str  # lower-case ASCII name, or address without brackets
    path: str  # with the query, percent-encoded

    @property
    def port(self) -> int:
        return PORTS[self.scheme]

    @property
    def netloc(self) -> str:
        """As the Host header has it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"

    @property
    def place(self) -> str:
        """For an error's text, which tells no address: a redirect may lead to one."""
        return "an address" if is_address(self.host) else self.host


def without_secrets(url: str) -> str:
    """For an error's text: short, and without the parts that hold passwords and signatures."""
    bare, mark, _ = url.partition("#")[0].partition("?")
    scheme, slashes, rest = bare.partition("://")
    user, _, place = rest.rpartition("@")
    return truncated_repr(
        f"{scheme}{slashes}{'…@' if user else ''}{place}{mark}{'…' if mark else ''}"
    )


def read_url(url: str) -> Target:
    """Raises `ValueError` with what is wrong of what is no plain URL of a web server.

    Ports are the scheme's own: others are where a host's other services are.
    """
    parts = _parse(url)
    if parts.scheme not in PORTS:
        raise ValueError("is no http:// or https:// URL")
    if parts.auth is not None:
        raise ValueError(f"has a user name or a password, which are not sent; {OTHER_WAY}")
    host = read_host(parts.host or "")
    if host is None:
        raise ValueError("its host is no name of ASCII letters (xn--…) and no plain address")
    if parts.port not in (None, PORTS[parts.scheme]):
        raise ValueError(
            f"port {parts.port}: only 80 of http and 443 of https are fetched from; {OTHER_WAY}"
        )
    return Target(parts.scheme, host, parts.request_uri)


def _parse(url: str) -> Url:
    if len(url) > MAX_CHARACTERS:
        raise ValueError(f"has {len(url)} characters; at most {MAX_CHARACTERS} are taken")
    if _UNSAFE.search(url):
        raise ValueError("has a space, a backslash or a control character; write %20, %5C, ...")
    try:
        return parse_url(url)
    except (LocationParseError, ValueError):
        raise ValueError("is no URL that can be read") from None


def read_host(host: str) -> str | None:
    """A host in its one form; None for what is none.

    Names that end in a number are addresses, to resolvers too ("0x7f.1", "2130706433"): of these,
    only four plain decimals are taken.
    """
    try:
        if host.startswith("[") and host.endswith("]"):
            address = IPv6Address(host[1:-1])
            return None if address.scope_id else str(address)
        labels = host.lower().split(".")
        if _NUMBER.fullmatch(labels[-1]):
            return str(IPv4Address(host))
    except ValueError:
        return None
    well = len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels)
    return host.lower() if well else None


def is_address(host: str) -> bool:
    """Of what `read_host` gave."""
    return ":" in host or bool(_NUMBER.fullmatch(host.rpartition(".")[2]))


def is_allowed(host: str, domains: Sequence[str]) -> bool:
    """Whether a list of hosts, "*.example.com" (what is below it) and "*" (all) has this one."""
    if host in domains or "*" in domains:
        return True
    below = tuple(domain[1:] for domain in domains if domain.startswith("*."))
    return not is_address(host) and host.endswith(below)
