"""API keys of all API servers: loading, reloading and checking."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from ..errors import ConfigError, RequestError

log = logging.getLogger("octavo.server")

VARIABLE = "OCTAVO_API_KEYS"  # comma-separated keys
MIN_KEY_LENGTH = 8  # characters
_BEARER = re.compile(r"bearer[ \t]+(\S.*)", re.IGNORECASE)  # RFC 9110, 11.4


class ApiKeys:
    """Accepted API keys, stored as SHA-256 digests so that comparisons do not leak key lengths.

    The key file is reloaded when it changes. If it cannot be read or has no keys, the previous keys
    stay valid.
    """

    def __init__(self, keys: Iterable[str], path: Path | None = None) -> None:
        """Take fixed `keys` and, in addition, those of the file `path`. Raises `ConfigError`."""
        self._fixed = [_digest(key) for key in keys]
        self._path, self._stamp = path, _stamp(path)
        self._digests = self._read()

    def _read(self) -> list[bytes]:
        if self._path is None:
            return self._fixed
        keys = _checked(_lines(self._path), str(self._path))
        if not keys and not self._fixed:
            raise ConfigError(f"{self._path}: the file has no keys; add one, or do not pass it")
        return [*self._fixed, *map(_digest, keys)]

    def _refresh(self) -> None:
        """Reload the key file if it has changed.

        The stamp is read before the file, so that a write during the read is noticed next time.
        """
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._digests = self._read()
        except ConfigError as error:  # its text contains no key
            log.warning("cannot reload the API key file: %s; the previous keys stay valid", error)
        else:
            log.info("reloaded the API key file")

    def accept(self, authorization: str | bytes | None) -> bool:
        """Return whether the `authorization` header has a valid key.

        All keys are compared, each in constant time.
        """
        self._refresh()
        given = bearer_token(authorization)
        digest = _digest(given or "")
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return given is not None and any(matches)

    def fault(self, authorization: str | bytes | None) -> RequestError:
        """Return the error of a call that `accept` rejects."""
        if bearer_token(authorization) is not None:
            text = "invalid API key"
        else:
            text = "missing API key; send the header `authorization: Bearer KEY`"
            text += " (octavo.Client(api_key=KEY), or OCTAVO_API_KEY=KEY for octavo chat)"
        return RequestError("UNAUTHENTICATED", f"authorization: {text}", "authorization")


def bearer_token(authorization: str | bytes | None) -> str | None:
    """Return the bearer token of an `authorization` header.

    The scheme is case-insensitive and followed by spaces or tabs. Returns None for another scheme
    or a missing token.
    """
    if not isinstance(authorization, str):
        return None
    found = _BEARER.fullmatch(authorization.strip(" \t"))
    return found[1] if found else None


def read_keys(
    path: Path | None, environment: MutableMapping[str, str] = os.environ
) -> ApiKeys | None:
    """Read the keys of a file, one per line, and of the environment.

    Empty lines and lines that start with # are skipped. Returns None if neither is given. Raises
    `ConfigError`, whose text contains no key.
    """
    variable = environment.pop(VARIABLE, None)  # child processes must not inherit keys
    if path is None and variable is None:
        return None
    keys = _checked((variable or "").split(","), VARIABLE)
    if path is None and not keys:
        raise ConfigError(f"{VARIABLE}: has no keys; add one, or unset it")
    return ApiKeys(keys, path)


def _checked(keys: Iterable[str], where: str) -> list[str]:
    found = [key.strip() for key in keys if key.strip()]
    for key in found:
        if len(key) < MIN_KEY_LENGTH or not (key.isascii() and key.isprintable()) or " " in key:
            text = f"each key must be {MIN_KEY_LENGTH} or more ASCII characters without spaces"
            raise ConfigError(f"{where}: {text}")
    return found


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: cannot read the API key file") from None
    return [line for line in lines if not line.lstrip().startswith("#")]


def _stamp(path: Path | None) -> tuple[int, ...]:
    """Return a value that changes with the file; empty if the file cannot be read."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ino, found.st_size) if found is not None else ()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
