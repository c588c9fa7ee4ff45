"""Where an item's bytes come from: a path, `file://`, a URL, a data URI, bytes."""

from __future__ import annotations

import base64
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

from ..config_error import ConfigError
from ..input_error import InputError, shown
from .fetch import fetch
from .limits import MediaLimits
from .task import MediaTask
from .urls import is_address, read_host

BYTES = str | bytes | bytearray | memoryview  # sequences that are no lists of frames
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{256}")  # no path goes on for so long without a dot
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
            raise ConfigError(f"--allow-media-path {shown(str(path))}: is no folder")
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
            f"--allow-media-domains {shown(domain)}: give a host (example.com), *.example.com for "
            "all below it, or * for all; no https://, port or path"
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
    if scheme.startswith("data:"):
        return _in_memory(_read_data_uri(source, limits, field), field, task)
    if scheme.startswith("file://"):
        rest = source[7:]
        source = unquote(rest[9:] if rest.startswith("localhost/") else rest)
    elif _SCHEME.match(source):
        text = "of URLs, only http://, https://, file:// and data: are read"
        raise InputError(field, f"{shown(source.partition(':')[0])}: {text}")
    elif _BASE64.match(source):
        raise InputError(field, "looks like base64: put data:image/png;base64, or the like before")
    return _open_file(source, access, limits, field)


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


def _read_data_uri(uri: str, limits: MediaLimits, field: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(field, f"{shown(uri)}: a data URI must be data:<type>;base64,<data>")
    if len(body) > limits.max_media_bytes * 4 // 3 + 4:
        limits.refuse("max_media_bytes", field, f"a data URI of {len(body)} characters")
    try:
        letters = body.encode("ascii").translate(None, b" \t\r\n\f\v")
        return base64.b64decode(letters, validate=True)
    except ValueError:  # binascii.Error is one; what is not ASCII is another
        raise InputError(field, "what follows base64, in the data URI is not base64") from None


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
        raise InputError(field, f"{shown(path)}: {reason}") from None
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
        raise InputError(field, f"{shown(path)}: is {kind}; give an image's or a video's file")
    _check_place(f"/proc/self/fd/{number}", path, access, field)
    limits.check_bytes(state.st_size, f"{field}: {shown(path)}")


def _check_place(place: str, path: str, access: MediaAccess, field: str) -> None:
    """Refuses what is under no root once links are followed. (Without /proc, that is all.)"""
    if access.roots is None:
        return
    real = Path(os.path.realpath(place))
    if not any(real.is_relative_to(root) for root in access.roots):
        raise InputError(
            field,
            f"{shown(path)}: is not in a folder that this server may read (--allow-media-path, "
            "allowed_media_paths= of LLM); send the bytes (octavo.Client does)",
        )
