"""Where an item's bytes come from: a path, `file://`, a data URI, bytes."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from PIL import Image

from ..input_error import InputError, shown
from .limits import MediaLimits

BYTES = str | bytes | bytearray | memoryview  # sequences that are no lists of frames


@dataclass(frozen=True)
class MediaAccess:
    """Which places a source may name, as who runs the engine has it."""

    roots: tuple[Path, ...] | None = None  # folders of files that may be read; None: all files
    domains: tuple[str, ...] = ()  # of URLs that may be fetched; "*": all


def open_source(
    source: Any, access: MediaAccess, limits: MediaLimits, field: str
) -> BinaryIO | Image.Image:
    """The file behind a source, to be closed by the caller; a PIL image as it is.

    Raises `InputError` for what is no source, may not be read, or is too large.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        limits.check_bytes(len(source), field)
        return io.BytesIO(source)
    if isinstance(source, os.PathLike):
        return _open_file(Path(source), access, limits, field)
    if not isinstance(source, str):
        text = "is no path, data URI, bytes, PIL image or array"
        raise InputError(field, f"{type(source).__name__} {text}")
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise InputError(
            field,
            f"{shown(source)}: URLs are not fetched; they come with --allow-media-domains in a "
            "later version. Send the bytes, or a data URI",
        )
    if scheme.startswith("data:"):
        return io.BytesIO(_read_data_uri(source, limits, field))
    path = unquote(source[7:]) if scheme.startswith("file://") else source
    return _open_file(Path(path), access, limits, field)


def _read_data_uri(uri: str, limits: MediaLimits, field: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(field, f"{shown(uri)}: a data URI must be data:<type>;base64,<data>")
    if len(body) > limits.max_media_bytes * 4 // 3 + 4:
        limits.refuse("max_media_bytes", field, f"a data URI of {len(body)} characters")
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:  # binascii.Error is one; what is not ASCII is another
        raise InputError(field, f"the data URI is not base64: {error}") from None
    limits.check_bytes(len(data), field)
    return data


def _open_file(path: Path, access: MediaAccess, limits: MediaLimits, field: str) -> BinaryIO:
    if access.roots is not None:
        raise InputError(
            field, "this server reads no files of its own; send the bytes (octavo.Client does)"
        )
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(field, f"{shown(str(path))}: {reason}") from None
    try:
        limits.check_bytes(os.fstat(file.fileno()).st_size, f"{field}: {shown(str(path))}")
    except InputError:
        file.close()
        raise
    return file
