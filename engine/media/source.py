"""Where an item's bytes come from: a path, `file://`, a URL, a data URI, bytes."""

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

BYTES = str | bytes | bytearray | memoryview  # sequences that are no lists of frames
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://")


@dataclass(frozen=True)
class MediaAccess:
    """Which places a source may name, as who runs the engine has it."""

    roots: tuple[Path, ...] | None = None  # folders of files that may be read, without links in
    # their paths; None: all files
    domains: tuple[str, ...] = ()  # of URLs that may be fetched, as `is_allowed` reads them


def media_access(paths: Sequence[str | Path], domains: Sequence[str], local: bool) -> MediaAccess:
    """Of --allow-media-path and --allow-media-domains. Raises `ConfigError`.

    `local`: callers are who runs the engine and may read all files, unless `paths` says less.
    """
    for path in paths:
        if not Path(path).is_dir():
            raise ConfigError(f"--allow-media-path {truncated_repr(str(path))}: is no folder")
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
            f"--allow-media-domains {truncated_repr(domain)}: give a host (example.com), "
            "*.example.com for all below it, or * for all; no https://, port or path"
        )
    return "*." * below + read


def open_source(
    source: Any, access: MediaAccess, field: str, task: MediaTask
) -> BinaryIO | Image.Image:
    """The file behind a source, to be closed by the caller; a PIL image as it is.

    Raises `InputError` for what is no source, may not be read, or is too large.
    """
    limits = task.limits
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        return _in_memory(source, field, task)
    if isinstance(source, os.PathLike):
        return _open_file(os.fsdecode(source), access, limits, field)
    if not isinstance(source, str):
        text = "is no path, data URI, bytes, PIL image or array"
        raise InputError(field, f"{type(source).__name__} {text}")
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _fetched(fetch(source, access.domains, field, task), field, task)
    if is_data_uri(source):
        return _in_memory(read_data_uri(source, limits, field), field, task)
    return _open_file(_path_of(source, field), access, limits, field)


def _path_of(source: str, field: str) -> str:
    """Raises `InputError` for what is surely no path."""
    if source[:7].lower() == "file://":
        rest = source[7:]
        return unquote(rest[9:] if rest.lower().startswith("localhost/") else rest)
    if _SCHEME.match(source.lstrip()[:64]):
        if source[0].isspace():
            raise InputError(
                field, f"{truncated_repr(source[:64])}: remove the space before the URL"
            )
        text = "of URLs, only http://, https://, file:// and data: are read"
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
    """A regular file that the caller may read."""
    if access.roots == ():
        raise InputError(
            field,
            "this server reads no files of its own (--allow-media-path names folders it may read, "
            "allowed_media_paths= of LLM); "
            "send the bytes (octavo.Client does)",
        )
    try:
        # A first look, so that what is elsewhere is neither opened nor told of.
        _check_place(path, path, access, field)
        # Nothing waits for a FIFO's other end, or becomes the process' terminal.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is no path"  # a ValueError: a null character
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
    """An open file: what it is, and where, whatever the path leads to by now."""
    state = os.fstat(number)
    if not stat.S_ISREG(state.st_mode):
        kind = "a directory" if stat.S_ISDIR(state.st_mode) else "no regular file"
        raise InputError(
            field, f"{truncated_repr(path)}: is {kind}; give an image's or a video's file"
        )
    _check_place(f"/proc/self/fd/{number}", path, access, field)
    limits.check_bytes(state.st_size, f"{field}: {truncated_repr(path)}")


def _check_place(place: str, path: str, access: MediaAccess, field: str) -> None:
    """Refuses what is under no root once links are followed. (Without /proc, that is all.)"""
    if access.roots is None:
        return
    real = Path(os.path.realpath(place))
    if not any(real.is_relative_to(root) for root in access.roots):
        raise InputError(
            field,
            f"{truncated_repr(path)}: is not in a folder that this server may read; send "
            "the bytes (octavo.Client does), or allow it (--allow-media-path, allowed_media_paths)",
        )
