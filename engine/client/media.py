"""Images and videos as the client sends them.

Numpy, torch and PIL are not imported here: their things are known by their looks. Files are read
here and sent as bytes, arrays as raw bytes with their shape; URLs go as they are, for the server to
fetch where it is allowed to.
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
    """A file of the server's own machine, under one of its --allow-media-path folders. (To
    `octavo.LLM` it is a path like any other.)"""

    path: str  # from the root on

    def __fspath__(self) -> str:
        return self.path


def media_item(part: Mapping[str, Any]) -> pb.MediaItem:
    """A message's part, or an item of `images` or `videos`. Raises `ClientError`."""
    kind = part["type"]
    item = pb.MediaItem(kind=KINDS[kind])
    known = IMAGE_OPTIONS if kind == "image" else tuple(pb.MediaOptions.DESCRIPTOR.fields_by_name)
    for name, value in part.items():
        if name in ("type", kind) or value is None:
            continue
        if name not in known:
            own = "" if kind in part else f"; the {kind} itself goes under {kind!r}"
            raise invalid(f"{name}: no option; {kind}s have {', '.join(known)}{own}")
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
    """Raises `ClientError` for what is no message any more."""
    try:
        size = request.ByteSize()
    except EncodeError:
        raise _too_large("the request has over 2 GiB") from None
    if size > MAX_MESSAGE_BYTES:
        raise _too_large(f"the request has {size / 2**20:,.0f} MiB")


def _too_large(what: str) -> ClientError:
    return invalid(
        f"{what}, and a message takes {MAX_MESSAGE_BYTES >> 20} MiB: host large files where the "
        "server may fetch them (--allow-media-domains) and give their URLs, or name files of the "
        "server's own as octavo.ServerFile (--allow-media-path)"
    )


def _set_source(target: Target, source: Any) -> Target:
    if isinstance(source, ServerFile):
        if not os.path.isabs(source.path):
            raise invalid(f"ServerFile({truncated_repr(source.path)}): must begin with /")
        target.url = f"file://{quote(source.path)}"
    elif isinstance(source, str) and _is_url(source):
        _check_bytes(len(source), "the data URI")
        target.url = source
    elif hasattr(source, "dtype") and hasattr(source, "shape"):  # numpy's or torch's
        data, dtype, shape = _raw(source)
        if dtype != "uint8":
            raise invalid(
                f"an array of {dtype}: must be uint8, 0 to 255 (for floats of 0 to 1, times 255)"
            )
        target.pixels.CopyFrom(pb.Pixels(data=data, shape=shape))
    else:
        target.data = _bytes(source)
    return target


def _is_url(source: str) -> bool:
    """Sent as it is; other texts are paths of files here. Raises `ClientError` for base64."""
    if source[:8].lower().startswith(URLS) or is_data_uri(source):
        return True
    if looks_like_base64(source):
        raise invalid(BARE_BASE64)
    return False


def _embeddings(source: Any) -> pb.Embeddings:
    """Of an `octavo.MediaEmbeds`."""
    if not hasattr(source.values, "dtype"):
        raise invalid(f"values: {type(source.values).__name__} is no numpy or torch array")
    data, dtype, shape = _raw(source.values)
    grid = source.grid_thw
    grid = grid.reshape(-1).tolist() if hasattr(grid, "reshape") else grid
    try:
        return pb.Embeddings(data=data, dtype=dtype, shape=shape, grid_thw=grid)
    except (TypeError, ValueError):
        raise invalid(f"grid_thw={truncated_repr(grid)}: must be three whole numbers") from None


def _raw(array: Any) -> tuple[bytes, str, tuple[int, ...]]:
    """An array's little-endian bytes in row-major order, its dtype's name, and its shape."""
    if getattr(array.dtype, "byteorder", "") == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    dtype, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    itemsize = getattr(array, "itemsize", 4)
    _check_bytes(math.prod(shape) * itemsize, "the array")
    if not hasattr(array, "detach"):
        return array.tobytes(), dtype, shape
    import torch  # the caller has it: the array is its

    whole = array.detach().cpu().contiguous()
    whole = whole.view(torch.int16) if array.dtype is torch.bfloat16 else whole
    return whole.numpy().tobytes(), dtype, shape


def _bytes(source: Any) -> bytes:
    """The bytes of a file, of bytes, or of a PIL image as PNG."""
    if isinstance(source, BYTES):
        _check_bytes(len(source), "the bytes")
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        return _read_file(os.fspath(source))
    if hasattr(source, "getexif"):  # PIL's
        return _png(source)
    raise invalid(f"{type(source).__name__} is no {SOURCES}")


def _read_file(path: str | bytes) -> bytes:
    path = os.fsdecode(path)
    if path[:7].lower() == "file://":
        path = unquote(path[7:]).removeprefix("localhost")
    try:
        size = Path(path).stat().st_size
        _check_bytes(size, truncated_repr(path))
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in it
        raise invalid(
            f"{truncated_repr(path)}: {getattr(error, 'strerror', None) or error}"
        ) from None


def _check_bytes(count: int, what: str) -> None:
    if count > MAX_MESSAGE_BYTES:
        raise _too_large(f"{what}: {count / 2**20:,.0f} MiB")


def _png(image: Any) -> bytes:
    """A PIL image without loss: its EXIF goes along, since it says which side is up."""
    buffer = io.BytesIO()
    try:
        if image.mode not in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"):
            exif, image = image.getexif(), image.convert("RGB")
        else:
            exif = image.getexif()
        image.save(buffer, "PNG", exif=exif)
    except (OSError, ValueError) as error:
        raise invalid(f"image of mode {image.mode}: cannot be sent: {error}") from None
    return buffer.getvalue()
