"""Parse and validate URLs, once and with one parser.

The parsed values are used for name resolution, the connection and the request, so that what is
checked is what is fetched.
"""

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
OTHER_WAY = "send the bytes or a data URI instead"

# Parsers disagree about these characters; valid URLs percent-encode them (%20, %5C, ...).
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True)
class Target:
    """Parsed URL of one HTTP request."""

    scheme: str
    host: str  # lower-case ASCII name, or IP address without brackets
    path: str  # including the query, percent-encoded

    @property
    def port(self) -> int:
        return PORTS[self.scheme]

    @property
    def netloc(self) -> str:
        """Value of the Host header."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"

    @property
    def place(self) -> str:
        """The host for an error message, without an IP address that a redirect may reveal."""
        return "an address" if is_address(self.host) else self.host


def without_secrets(url: str) -> str:
    """Shorten a URL for an error message; remove user info and query, which may have secrets."""
    bare, mark, _ = url.partition("#")[0].partition("?")
    scheme, slashes, rest = bare.partition("://")
    user, _, location = rest.rpartition("@")
    return truncated_repr(
        f"{scheme}{slashes}{'…@' if user else ''}{location}{mark}{'…' if mark else ''}"
    )


def read_url(url: str) -> Target:
    """Parse and validate an http or https URL.

    Raises `ValueError` with the reason if the URL is invalid, has user info, or has a port other
    than the scheme's default, where a host may have other services.
    """
    parts = _parse(url)
    if parts.scheme not in PORTS:
        raise ValueError("is not an http:// or https:// URL")
    if parts.auth is not None:
        raise ValueError(f"user names and passwords in URLs are not supported; {OTHER_WAY}")
    host = read_host(parts.host or "")
    if host is None:
        raise ValueError("the host must be an ASCII name (xn--… for others) or a plain IP address")
    if parts.port not in (None, PORTS[parts.scheme]):
        raise ValueError(
            f"port {parts.port}: only 80 (http) and 443 (https) are allowed; {OTHER_WAY}"
        )
    return Target(parts.scheme, host, parts.request_uri)


def _parse(url: str) -> Url:
    if len(url) > MAX_CHARACTERS:
        raise ValueError(f"has {len(url)} characters; the maximum is {MAX_CHARACTERS}")
    if _UNSAFE.search(url):
        raise ValueError("has a space, backslash or control character; write %20, %5C, ...")
    try:
        return parse_url(url)
    except (LocationParseError, ValueError):
        raise ValueError("is not a valid URL") from None


def read_host(host: str) -> str | None:
    """Return a host in canonical form; None if it is invalid.

    Resolvers treat names that end in a number as addresses ("0x7f.1", "2130706433"); of these, only
    four plain decimals are accepted.
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
    is_valid = len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels)
    return host.lower() if is_valid else None


def is_address(host: str) -> bool:
    """Return whether a host from `read_host` is an IP address."""
    return ":" in host or bool(_NUMBER.fullmatch(host.rpartition(".")[2]))


def is_allowed(host: str, domains: Sequence[str]) -> bool:
    """Return whether `domains` allow a host.

    An entry is a host, "*.example.com" (all subdomains) or "*" (all hosts).
    """
    if host in domains or "*" in domains:
        return True
    below = tuple(domain[1:] for domain in domains if domain.startswith("*."))
    return not is_address(host) and host.endswith(below)
