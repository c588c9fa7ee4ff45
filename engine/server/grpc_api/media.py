"""Convert protobuf media sources to the engine's inputs.

Arrays arrive as raw bytes with dtype and shape, which are checked before numpy reads them.
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
MAX_NUMBERS = 8  # read at most this many dimensions; valid shapes have fewer
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


def read_source(item: pb.MediaItem, field: str) -> Any:
    """Return a media item's source for a content part. Raises `InputError`."""
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
        raise InputError(
            f"{field}.frames", "has both data and frames; put all frames into one of them"
        )
    return list(frames.data) or [
        _read_frame(frame, f"{field}[{index}]") for index, frame in enumerate(frames.frames)
    ]


def _read_frame(frame: pb.Frame, field: str) -> Any:
    form = frame.WhichOneof("source")
    if form is None:
        raise InputError(field, "has no source; set data, url or pixels")
    if form == "pixels":
        return _read_pixels(frame.pixels, "image", f"{field}.pixels")
    return frame.data if form == "data" else frame.url


def _read_pixels(pixels: pb.Pixels, kind: str, field: str) -> npt.NDArray[np.uint8]:
    """Return the pixels as a view of the bytes."""
    axes = PIXEL_AXES[kind]
    return _read_array(pixels.data, np.dtype(np.uint8), pixels.shape, axes, field)


def _read_embeddings(embeddings: pb.Embeddings, field: str) -> MediaEmbeds:
    """Read embeddings. The engine checks later that they fit the model and the grid."""
    dtype = embeddings.dtype
    if dtype not in DTYPES:
        names = ", ".join(DTYPES)
        raise InputError(f"{field}.dtype", f"{truncated_repr(dtype)}: must be one of {names}")
    grid = tuple(embeddings.grid_thw[:MAX_NUMBERS])
    if len(grid) != 3 or min(grid) < 1:
        text = f"{truncated_repr(list(grid))}: must be three integers >= 1"
        raise InputError(f"{field}.grid_thw", f"{text}: patches in time, height and width")
    axes = "tokens, hidden size"
    values = _read_array(embeddings.data, np.dtype(DTYPES[dtype]), embeddings.shape, axes, field)
    if dtype == "bfloat16":  # the upper half of a float32
        values = (values.astype("<u4") << 16).view("<f4")
    return MediaEmbeds(values, (grid[0], grid[1], grid[2]))


def _read_array(
    data: bytes, dtype: np.dtype[Any], shape: Sequence[int], axes: str, field: str
) -> npt.NDArray[Any]:
    """Return an array view of the bytes. Raises `InputError` if shape or size do not match.

    `axes`: names of the expected dimensions, for errors.
    """
    sizes = tuple(shape[:MAX_NUMBERS])
    if len(sizes) != len(axes.split(", ")) or min(sizes) < 1:
        text = f"{truncated_repr(list(sizes))}: must be ({axes}), each >= 1"
        raise InputError(f"{field}.shape", text)
    wanted = math.prod(sizes) * dtype.itemsize
    if len(data) != wanted:
        text = f"has {len(data)} bytes; shape {list(sizes)} needs {wanted}"
        raise InputError(f"{field}.data", text)
    return np.frombuffer(data, dtype).reshape(sizes)
