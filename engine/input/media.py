"""Images and videos of a request: their options, where they may come from, what they become."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import InputError, shown

Pixels = npt.NDArray[np.uint8]  # [frames, height, width, 3]
Grid = tuple[int, int, int]

MAX_ITEMS = 256  # images and videos of a request
MAX_FILE_BYTES = 256 << 20
MAX_DECODED_PIXELS = 120_000_000  # of one image, or of one frame of a video
MAX_LISTED_FRAMES = 2048  # of a video given as a list

IMAGE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
MOST = 1 << 40


@dataclass(frozen=True)
class MediaOptions:
    """What shapes an item, with the meaning that qwen-vl-utils gives these names."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    total_pixels: int | None = None

    @classmethod
    def from_part(cls, part: Mapping[str, Any], kind: str, field: str) -> MediaOptions:
        """The options written beside an image or a video. Raises `InputError`."""
        known = IMAGE_OPTIONS if kind == "image" else tuple(f.name for f in fields(cls))
        found: dict[str, Any] = {}
        for name, value in part.items():
            if name in ("type", kind) or value is None:
                continue
            if name not in known:
                raise InputError(field, f"{name!r} is no option; {kind}s have {', '.join(known)}")
            found[name] = _number(value, name, f"{field}.{name}")
        options = cls(**found)
        options._check(field)
        return options

    def _check(self, field: str) -> None:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            text = f"{self.min_pixels} is over max_pixels={self.max_pixels}"
            raise InputError(f"{field}.min_pixels", text)
        if self.fps is not None and self.nframes is not None:
            raise InputError(f"{field}.fps", "give fps or nframes, not both")
        if (self.resized_height is None) != (self.resized_width is None):
            raise InputError(f"{field}.resized_height", "goes with resized_width: give both")


def _number(value: Any, name: str, field: str) -> float:
    kinds = (int, float) if name == "fps" else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
        kind = "a number" if name == "fps" else "a whole number"
        raise InputError(field, f"{shown(value)}: must be {kind}")
    if not 0 < value <= MOST:
        raise InputError(field, f"{shown(value)}: must be over 0 and at most {MOST}")
    return value


@dataclass(frozen=True)
class MediaInfo:
    """What was made of an item, as echoed to the caller."""

    kind: str  # "image" | "video"
    height: int  # pixels after resizing
    width: int
    num_frames: int
    num_tokens: int
    grid_thw: Grid
    frame_indices: tuple[int, ...] = ()  # of the file's frames
    sample_fps: float | None = None


@dataclass(frozen=True, eq=False)
class MediaItem:
    """A resized image or video, ready to encode."""

    kind: str
    pixels: Pixels  # an image has one frame
    grid_thw: Grid
    media_hash: bytes
    info: MediaInfo

    @property
    def num_tokens(self) -> int:
        return self.info.num_tokens


def make_item(
    kind: str,
    pixels: Pixels,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    frame_indices: tuple[int, ...] = (),
    sample_fps: float | None = None,
) -> MediaItem:
    """An item of pixels [frames, height, width, 3] that fit the patches."""
    frames, height, width, _ = pixels.shape
    grid = (-(-frames // temporal_patch_size), height // patch_size, width // patch_size)
    num_tokens = math.prod(grid) // merge_size**2
    info = MediaInfo(kind, height, width, frames, num_tokens, grid, frame_indices, sample_fps)
    return MediaItem(kind, pixels, grid, media_hash(kind, pixels), info)


def media_hash(kind: str, pixels: Pixels) -> bytes:
    """SHA-256 of the canonical pixels, tagged and with every part's length.

    The resized pixels carry all that options did; so equal items of different options are one.
    """
    digest = hashlib.sha256(b"octavo.media.v1")
    for part in (kind.encode(), repr(pixels.shape).encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    digest.update(pixels.nbytes.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def read_source(source: Any, field: str, allow_local_files: bool) -> bytes | Image.Image:
    """The bytes of a path, `file://`, data URI or bytes; a PIL image as it is."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        return _checked(bytes(source), field)
    if isinstance(source, os.PathLike):
        return _read_file(Path(source), field, allow_local_files)
    if not isinstance(source, str):
        raise InputError(field, f"{type(source).__name__} is no path, data URI, bytes or PIL image")
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise InputError(
            field,
            f"{shown(source)}: URLs are not fetched; they come with --allow-media-domains in a "
            "later version. Send the bytes, or a data URI",
        )
    if scheme.startswith("data:"):
        return _read_data_uri(source, field)
    path = unquote(source[7:]) if scheme.startswith("file://") else source
    return _read_file(Path(path), field, allow_local_files)


def _read_data_uri(uri: str, field: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(field, f"{shown(uri)}: a data URI must be data:<type>;base64,<data>")
    if len(body) > MAX_FILE_BYTES * 4 // 3 + 4:
        raise InputError(field, f"over {MAX_FILE_BYTES} bytes")
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:  # binascii.Error is one; what is not ASCII is another
        raise InputError(field, f"the data URI is not base64: {error}") from None
    return _checked(data, field)


def _read_file(path: Path, field: str, allow_local_files: bool) -> bytes:
    if not allow_local_files:
        raise InputError(
            field, "this server reads no files of its own; send the bytes (octavo.Client does)"
        )
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(field, f"{shown(str(path))}: over {MAX_FILE_BYTES} bytes")
        return _checked(path.read_bytes(), field)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(field, f"{shown(str(path))}: {reason}") from None


def _checked(data: bytes, field: str) -> bytes:
    if not data:
        raise InputError(field, "has no bytes")
    if len(data) > MAX_FILE_BYTES:
        raise InputError(field, f"{len(data)} bytes; at most {MAX_FILE_BYTES}")
    return data


def check_decoded_size(width: int, height: int, field: str) -> None:
    """The one limit on what an image or a frame may decode to."""
    if width < 1 or height < 1:
        raise InputError(field, f"{width}×{height} pixels: has no size")
    if width * height > MAX_DECODED_PIXELS:
        raise InputError(field, f"{width}×{height} pixels; at most {MAX_DECODED_PIXELS} in all")
