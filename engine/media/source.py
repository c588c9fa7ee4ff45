"""Open the source of a media item: a path, `file://` or web URL, data URI, or bytes."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from PIL import Image

from ...scheduler.params import truncated_repr
from ..config.media_limits import MediaLimits
from ..errors import ConfigError, InputError
from .data_uri import read_data_uri
from .fetch.fetch import fetch
from .fetch.urls import is_address, read_host
from .source_text import BARE_BASE64, is_data_uri, looks_like_base64
from .task import MediaTask

BYTES = str | bytes | bytearray | memoryview  # sequences that are not lists of frames
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://")


@dataclass(frozen=True)
class MediaAccess:
    """The operator's allow-lists of local folders and web domains."""

    roots: tuple[Path, ...] | None = None  # readable folders, symlinks resolved; None: all files
    domains: tuple[str, ...] = ()  # domains of URLs that may be fetched; see `is_allowed`


def media_access(paths: Sequence[str | Path], domains: Sequence[str], local: bool) -> MediaAccess:
    """Parse --allow-media-path and --allow-media-domains.

    `local`: the callers are the operator's own code and may read all files unless `paths` is given.
    Raises `ConfigError` if a path is not a folder or a domain is invalid.
    """
    for path in paths:
        if not Path(path).is_dir():
            raise ConfigError(
                f"--allow-media-path {truncated_repr(str(path))}: is not a folder; create it or "
                "correct the path"
            )
    roots = None if local and not paths else tuple(Path(os.path.realpath(path)) for path in paths)
    return MediaAccess(roots, tuple(_read_domain(domain) for domain in domains))


def _read_domain(domain: str) -> str:
    host = domain.strip().lower()
    if host == "*":
        return host
    below = host.startswith("*.")
    bare = f"[{host}]" if host.count(":") > 1 and "[" not in host else host[2 * below :]
    read = read_host(bare)
    if read is None or (below and is_address(read)):
        raise ConfigError(
            f"--allow-media-domains {truncated_repr(domain)}: must be a host (example.com), "
            "*.example.com for all its subdomains, or * for all; without https://, port or path"
        )
    return "*." * below + read


def open_source(
    source: Any, access: MediaAccess, field: str, task: MediaTask
) -> BinaryIO | Image.Image:
    """Open a source and return its file, which the caller closes; return a PIL image unchanged.

    Raises `InputError` if the source has the wrong type, must not be read, or is too large.
    """
    limits = task.limits
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        return _in_memory(source, field, task)
    if isinstance(source, os.PathLike):
        return _open_file(os.fsdecode(source), access, limits, field)
    if not isinstance(source, str):
        text = "must be a path, URL, data URI, bytes, PIL image or array"
        raise InputError(field, f"{type(source).__name__}: {text}")
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _fetched(fetch(source, access.domains, field, task), field, task)
    if is_data_uri(source):
        return _in_memory(read_data_uri(source, limits, field), field, task)
    return _open_file(_path_of(source, field), access, limits, field)


def _path_of(source: str, field: str) -> str:
    """Return the path of a `file://` URL or a plain path.

    Raises `InputError` for a URL of another scheme and for base64 without a `data:` prefix.
    """
    if source[:7].lower() == "file://":
        rest = source[7:]
        return unquote(rest[9:] if rest.lower().startswith("localhost/") else rest)
    if _SCHEME.match(source.lstrip()[:64]):
        if source[0].isspace():
            raise InputError(
                field, f"{truncated_repr(source[:64])}: remove the space before the URL"
            )
        text = "unsupported URL scheme; only http://, https://, file:// and data: are supported"
        raise InputError(field, f"{truncated_repr(source.partition(':')[0])}: {text}")
    if looks_like_base64(source):
        raise InputError(field, BARE_BASE64)
    return source


def _in_memory(data: bytes | bytearray | memoryview, field: str, task: MediaTask) -> BinaryIO:
    task.limits.check_bytes(len(data), field)
    task.charge(len(data), field)
    return io.BytesIO(data)


def _fetched(file: BinaryIO, field: str, task: MediaTask) -> BinaryIO:
    try:
        task.charge(file.seek(0, io.SEEK_END), field)
    except InputError:
        file.close()
        raise
    file.seek(0)
    return file


def _open_file(path: str, access: MediaAccess, limits: MediaLimits, field: str) -> BinaryIO:
    """Open a regular file inside the allowed folders."""
    if access.roots == ():
        raise InputError(
            field,
            "reading files on the server is disabled (enable it with --allow-media-path, "
            "allowed_media_paths= of LLM); "
            "send the bytes (octavo.Client does)",
        )
    try:
        # Check before opening, so that a forbidden path is not opened and errors do not reveal
        # whether it exists.
        _check_location(path, path, access, field)
        # O_NONBLOCK: opening a FIFO must not wait for its other end. O_NOCTTY: opening a terminal
        # must not make it this process's controlling terminal.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        # A null character in the path raises a ValueError.
        reason = getattr(error, "strerror", None) or "is not a valid path"
        raise InputError(field, f"{truncated_repr(path)}: {reason}") from None
    try:
        _check_file(number, path, access, limits, field)
        return open(number, "rb")
    except BaseException:
        os.close(number)
        raise


def _check_file(
    number: int, path: str, access: MediaAccess, limits: MediaLimits, field: str
) -> None:
    """Check an open file's type, location and size: its path may have been replaced meanwhile."""
    state = os.fstat(number)
    if not stat.S_ISREG(state.st_mode):
        kind = "a directory" if stat.S_ISDIR(state.st_mode) else "not a regular file"
        raise InputError(
            field, f"{truncated_repr(path)}: is {kind}; pass the path of an image or video file"
        )
    _check_location(f"/proc/self/fd/{number}", path, access, field)
    limits.check_bytes(state.st_size, f"{field}: {truncated_repr(path)}")


def _check_location(location: str, path: str, access: MediaAccess, field: str) -> None:
    """Raise `InputError` if `location`, with symlinks resolved, is outside all allowed folders.

    `path` is shown in the error. If /proc is not mounted, the check of an open file rejects it.
    """
    if access.roots is None:
        return
    real = Path(os.path.realpath(location))
    if not any(real.is_relative_to(root) for root in access.roots):
        raise InputError(
            field,
            f"{truncated_repr(path)}: is not in a folder that the server may read; send the bytes "
            "(octavo.Client does), or allow the folder (--allow-media-path, allowed_media_paths)",
        )
