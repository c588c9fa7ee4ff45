"""Build protobuf media items from the client's images and videos.

Local files are read and sent as bytes, arrays as raw bytes with their shape. URLs are sent as they
are; the server fetches them if allowed. Objects of numpy, torch and PIL are detected by duck
typing, to avoid importing these libraries.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from google.protobuf.message import EncodeError

from ...proto import octavo_pb2 as pb
from ...scheduler.params import truncated_repr
from ..media.options import IMAGE_OPTIONS
from ..media.source_text import BARE_BASE64, is_data_uri, looks_like_base64
from .errors import ClientError, invalid

MAX_MESSAGE_BYTES = 256 << 20
KINDS = {"image": pb.MEDIA_KIND_IMAGE, "video": pb.MEDIA_KIND_VIDEO}
BYTES = bytes | bytearray | memoryview
URLS = ("http://", "https://")
Target = TypeVar("Target", pb.MediaItem, pb.Frame)
SOURCES = (
    "path, file://, http(s):// URL, data URI, bytes, PIL image, uint8 array, octavo.MediaEmbeds or "
    "octavo.ServerFile"
)


@dataclass(frozen=True)
class ServerFile:
    """A file on the server's machine, in one of its --allow-media-path folders.

    `octavo.LLM` treats it like any other path.
    """

    path: str  # absolute

    def __fspath__(self) -> str:
        return self.path


def media_item(part: Mapping[str, Any]) -> pb.MediaItem:
    """Convert a content part, or an item of `images` or `videos`. Raises `ClientError`."""
    kind = part["type"]
    item = pb.MediaItem(kind=KINDS[kind])
    known = IMAGE_OPTIONS if kind == "image" else tuple(pb.MediaOptions.DESCRIPTOR.fields_by_name)
    for name, value in part.items():
        if name in ("type", kind) or value is None:
            continue
        if name not in known:
            own = "" if kind in part else f"; put the {kind} itself under {kind!r}"
            raise invalid(f"{name}: unknown option; {kind}s have {', '.join(known)}{own}")
        try:
            setattr(item.options, name, value)
        except (TypeError, ValueError):
            raise invalid(f"{name}={truncated_repr(value)}: must be a number") from None
    source = part.get(kind)
    if source is None:
        return item
    if hasattr(source, "grid_thw") and hasattr(source, "values"):
        item.embeddings.CopyFrom(_embeddings(source))
    elif isinstance(source, Sequence) and not isinstance(source, str | BYTES):
        item.frames.frames.extend(_set_source(pb.Frame(), frame) for frame in source)
    else:
        _set_source(item, source)
    return item


def check_size(request: pb.GenerateRequest) -> None:
    """Raise `ClientError` if a request is too large for a message."""
    try:
        size = request.ByteSize()
    except EncodeError:
        raise _too_large("the request is over 2 GiB") from None
    if size > MAX_MESSAGE_BYTES:
        raise _too_large(f"the request has {size / 2**20:,.0f} MiB")


def _too_large(what: str) -> ClientError:
    return invalid(
        f"{what}; a message may have {MAX_MESSAGE_BYTES >> 20} MiB. For large files, pass URLs "
        "that the server may fetch (--allow-media-domains), or octavo.ServerFile for files on the "
        "server (--allow-media-path)"
    )


def _set_source(target: Target, source: Any) -> Target:
    if isinstance(source, ServerFile):
        if not os.path.isabs(source.path):
            raise invalid(f"ServerFile({truncated_repr(source.path)}): must be an absolute path")
        target.url = f"file://{quote(source.path)}"
    elif isinstance(source, str) and _is_url(source):
        _check_bytes(len(source), "the data URI")
        target.url = source
    elif hasattr(source, "dtype") and hasattr(source, "shape"):  # a numpy or torch array
        data, dtype, shape = _raw(source)
        if dtype != "uint8":
            raise invalid(
                f"an array of {dtype}: must be uint8, 0 to 255 (multiply floats of 0 to 1 by 255)"
            )
        target.pixels.CopyFrom(pb.Pixels(data=data, shape=shape))
    else:
        target.data = _bytes(source)
    return target


def _is_url(source: str) -> bool:
    """Return whether a string is a URL, else it is a path. Raises `ClientError` for base64."""
    if source[:8].lower().startswith(URLS) or is_data_uri(source):
        return True
    if looks_like_base64(source):
        raise invalid(BARE_BASE64)
    return False


def _embeddings(source: Any) -> pb.Embeddings:
    """Convert an `octavo.MediaEmbeds`. Raises `ClientError`."""
    if not hasattr(source.values, "dtype"):
        raise invalid(f"values: must be a numpy or torch array, not {type(source.values).__name__}")
    data, dtype, shape = _raw(source.values)
    grid = source.grid_thw
    grid = grid.reshape(-1).tolist() if hasattr(grid, "reshape") else grid
    try:
        return pb.Embeddings(data=data, dtype=dtype, shape=shape, grid_thw=grid)
    except (TypeError, ValueError):
        raise invalid(f"grid_thw={truncated_repr(grid)}: must be three integers") from None


def _raw(array: Any) -> tuple[bytes, str, tuple[int, ...]]:
    """Return an array's little-endian bytes in row-major order, its dtype name and its shape."""
    if getattr(array.dtype, "byteorder", "") == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    dtype, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    itemsize = getattr(array, "itemsize", 4)
    _check_bytes(math.prod(shape) * itemsize, "the array")
    if not hasattr(array, "detach"):
        return array.tobytes(), dtype, shape
    import torch  # already imported: the array is a torch tensor

    whole = array.detach().cpu().contiguous()
    whole = whole.view(torch.int16) if array.dtype is torch.bfloat16 else whole
    return whole.numpy().tobytes(), dtype, shape


def _bytes(source: Any) -> bytes:
    """Return the bytes of a file, of a bytes object, or of a PIL image as PNG."""
    if isinstance(source, BYTES):
        _check_bytes(len(source), "the bytes")
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        return _read_file(os.fspath(source))
    if hasattr(source, "getexif"):  # a PIL image
        return _png(source)
    raise invalid(f"unsupported type {type(source).__name__}; pass a {SOURCES}")


def _read_file(path: str | bytes) -> bytes:
    path = os.fsdecode(path)
    if path[:7].lower() == "file://":
        path = unquote(path[7:]).removeprefix("localhost")
    try:
        size = Path(path).stat().st_size
        _check_bytes(size, truncated_repr(path))
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise invalid(
            f"{truncated_repr(path)}: {getattr(error, 'strerror', None) or error}"
        ) from None


def _check_bytes(count: int, what: str) -> None:
    if count > MAX_MESSAGE_BYTES:
        raise _too_large(f"{what}: {count / 2**20:,.0f} MiB")


def _png(image: Any) -> bytes:
    """Encode a PIL image losslessly, with its EXIF data, which has the orientation."""
    buffer = io.BytesIO()
    try:
        if image.mode not in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"):
            exif, image = image.getexif(), image.convert("RGB")
        else:
            exif = image.getexif()
        image.save(buffer, "PNG", exif=exif)
    except (OSError, ValueError) as error:
        raise invalid(f"cannot encode an image of mode {image.mode} as PNG: {error}") from None
    return buffer.getvalue()
