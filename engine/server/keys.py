"""API keys: which are the server's, and whether a call brings one. For every door."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from ..config import ConfigError
from .errors import Fault

VARIABLE = "OCTAVO_API_KEYS"  # keys apart by commas
LEAST = 8  # characters of a key
SCHEME = "Bearer "


class ApiKeys:
    """Kept as their digests: a comparison tells nothing of a key, not even its length."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def accept(self, authorization: str | bytes | None) -> bool:
        """Whether a header `authorization` brings one of the keys: all of them are compared, each
        in constant time."""
        text = authorization if isinstance(authorization, str) else ""
        given = _digest(text.removeprefix(SCHEME))
        same = [hmac.compare_digest(given, digest) for digest in self._digests]
        return text.startswith(SCHEME) and any(same)

    def fault(self, authorization: str | bytes | None) -> Fault:
        """What a call is told that `accept` refuses."""
        if isinstance(authorization, str) and authorization.startswith(SCHEME):
            text = "the API key is not one of this server's"
        else:
            text = "this server asks for an API key: send the header `authorization: Bearer KEY`"
        return Fault("UNAUTHENTICATED", f"authorization: {text}", "authorization")


def read_keys(
    path: Path | None, environment: MutableMapping[str, str] = os.environ
) -> ApiKeys | None:
    """The keys of a file, one a line, and of the environment; None where neither is given. Lines
    that are empty or begin with # are none. Raises `ConfigError`, which tells no key."""
    variable = environment.pop(VARIABLE, None)  # processes that are started inherit no keys
    if path is None and variable is None:
        return None
    keys = _checked((variable or "").split(","), VARIABLE)
    if path is not None:
        keys += _checked(_lines(path), str(path))
    if not keys:
        raise ConfigError(f"{path or VARIABLE}: has no key; give one, or leave it out")
    return ApiKeys(keys)


def _checked(keys: Iterable[str], where: str) -> list[str]:
    found = [key.strip() for key in keys if key.strip()]
    for key in found:
        if len(key) < LEAST or not (key.isascii() and key.isprintable()) or " " in key:
            text = f"a key must have {LEAST} characters or more, of ASCII and without spaces"
            raise ConfigError(f"{where}: {text}")
    return found


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: cannot be read as a file of API keys") from None
    return [line for line in lines if not line.lstrip().startswith("#")]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
