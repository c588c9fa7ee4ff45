"""The sources of the public protocol's media, as the engine takes them.

Numbers come as raw bytes with their type and shape, all of which is checked here before numpy sees
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ....proto import octavo_pb2 as pb
from ....scheduler.params import truncated_repr
from ...errors import InputError
from ...media.embeds import MediaEmbeds

PIXEL_AXES = {"image": "height, width, channels", "video": "frames, height, width, channels"}
MAX_NUMBERS = 8  # of a shape, that are looked at: it has fewer
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


def read_source(item: pb.MediaItem, field: str) -> Any:
    """What a message's part may have as its source. Raises `InputError`."""
    form = item.WhichOneof("source")
    if form == "frames":
        return _read_frames(item.frames, field)
    if form == "pixels":
        kind = "image" if item.kind == pb.MEDIA_KIND_IMAGE else "video"
        return _read_pixels(item.pixels, kind, f"{field}.pixels")
    if form == "embeddings":
        return _read_embeddings(item.embeddings, f"{field}.embeddings")
    return item.data if form == "data" else item.url


def _read_frames(frames: pb.Frames, field: str) -> list[Any]:
    if frames.data and frames.frames:
        raise InputError(f"{field}.frames", "has data and frames: give all frames in one of them")
    return list(frames.data) or [
        _read_frame(frame, f"{field}[{index}]") for index, frame in enumerate(frames.frames)
    ]


def _read_frame(frame: pb.Frame, field: str) -> Any:
    form = frame.WhichOneof("source")
    if form is None:
        raise InputError(field, "has no source: give data, url or pixels")
    if form == "pixels":
        return _read_pixels(frame.pixels, "image", f"{field}.pixels")
    return frame.data if form == "data" else frame.url


def _read_pixels(pixels: pb.Pixels, kind: str, field: str) -> npt.NDArray[np.uint8]:
    """A view of the bytes."""
    axes = PIXEL_AXES[kind]
    return _read_array(pixels.data, np.dtype(np.uint8), pixels.shape, axes, field)


def _read_embeddings(embeddings: pb.Embeddings, field: str) -> MediaEmbeds:
    """Whether they are the model's, and the grid theirs, the engine says."""
    dtype = embeddings.dtype
    if dtype not in DTYPES:
        names = ", ".join(DTYPES)
        raise InputError(f"{field}.dtype", f"{truncated_repr(dtype)}: must be one of {names}")
    grid = tuple(embeddings.grid_thw[:MAX_NUMBERS])
    if len(grid) != 3 or min(grid) < 1:
        text = f"{truncated_repr(list(grid))}: must be three integers >= 1: patches in time"
        raise InputError(f"{field}.grid_thw", f"{text}, height, width")
    axes = "tokens, hidden size"
    values = _read_array(embeddings.data, np.dtype(DTYPES[dtype]), embeddings.shape, axes, field)
    if dtype == "bfloat16":  # the upper half of a float32
        values = (values.astype("<u4") << 16).view("<f4")
    return MediaEmbeds(values, (grid[0], grid[1], grid[2]))


def _read_array(
    data: bytes, dtype: np.dtype[Any], shape: Sequence[int], axes: str, field: str
) -> npt.NDArray[Any]:
    """A view of the bytes, if they are what the shape says. `axes` names its numbers."""
    sizes = tuple(shape[:MAX_NUMBERS])
    if len(sizes) != len(axes.split(", ")) or min(sizes) < 1:
        text = f"{truncated_repr(list(sizes))}: must be {axes}, each from 1 on"
        raise InputError(f"{field}.shape", text)
    wanted = math.prod(sizes) * dtype.itemsize
    if len(data) != wanted:
        text = f"{len(data)} bytes, and the shape {list(sizes)} has {wanted}"
        raise InputError(f"{field}.data", text)
    return np.frombuffer(data, dtype).reshape(sizes)
