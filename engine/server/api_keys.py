"""API keys: which are the server's, and whether a call brings one. For every door."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from ..errors import ConfigError
from .errors import ErrorInfo

log = logging.getLogger("octavo.server")

VARIABLE = "OCTAVO_API_KEYS"  # keys apart by commas
LEAST = 8  # characters of a key
_BEARER = re.compile(r"bearer[ \t]+(\S.*)", re.IGNORECASE)  # RFC 9110, 11.4


class ApiKeys:
    """Kept as their digests: a comparison tells nothing of a key, not even its length. Those of a
    file are read again when it changes; one that cannot be read, or has none, changes nothing."""

    def __init__(self, keys: Iterable[str], path: Path | None = None) -> None:
        """`keys`: that stay; those of the file `path` come beside them. Raises `ConfigError`."""
        self._fixed = [_digest(key) for key in keys]
        self._path, self._stamp = path, _stamp(path)
        self._digests = self._read()

    def _read(self) -> list[bytes]:
        if self._path is None:
            return self._fixed
        found = _checked(_lines(self._path), str(self._path))
        if not found and not self._fixed:
            raise ConfigError(f"{self._path}: has no key; give one, or leave it out")
        return [*self._fixed, *map(_digest, found)]

    def _refresh(self) -> None:
        """Looks at the file's stamp first: what is written while it is read is seen next time."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._digests = self._read()
        except ConfigError as error:  # it tells no key
            log.warning("the file of API keys has changed: %s; the former keys stay", error)
        else:
            log.info("the file of API keys has changed and is used from now on")

    def accept(self, authorization: str | bytes | None) -> bool:
        """Return whether the header `authorization` has one of the keys. All keys are compared,
        each in constant time."""
        self._refresh()
        given = bearer_token(authorization)
        digest = _digest(given or "")
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return given is not None and any(matches)

    def fault(self, authorization: str | bytes | None) -> ErrorInfo:
        """Return the error of a call that `accept` rejects."""
        if bearer_token(authorization) is not None:
            text = "the API key is not one of this server's"
        else:
            text = "this server asks for an API key: send the header `authorization: Bearer KEY`"
            text += " (octavo.Client(api_key=KEY) does, and octavo chat with OCTAVO_API_KEY=KEY)"
        return ErrorInfo("UNAUTHENTICATED", f"authorization: {text}", "authorization")


def bearer_token(authorization: str | bytes | None) -> str | None:
    """Return the token of a header `authorization`: the scheme in any case, then spaces or tabs.
    None for another scheme and for a header without a token."""
    if not isinstance(authorization, str):
        return None
    found = _BEARER.fullmatch(authorization.strip(" \t"))
    return found[1] if found else None


def read_keys(
    path: Path | None, environment: MutableMapping[str, str] = os.environ
) -> ApiKeys | None:
    """The keys of a file, one a line, and of the environment; None where neither is given. Lines
    that are empty or begin with # are none. Raises `ConfigError`, which tells no key."""
    variable = environment.pop(VARIABLE, None)  # processes that are started inherit no keys
    if path is None and variable is None:
        return None
    keys = _checked((variable or "").split(","), VARIABLE)
    if path is None and not keys:
        raise ConfigError(f"{VARIABLE}: has no key; give one, or leave it out")
    return ApiKeys(keys, path)


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


def _stamp(path: Path | None) -> tuple[int, ...]:
    """What changes when the file does; empty where there is none."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ino, found.st_size) if found is not None else ()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
