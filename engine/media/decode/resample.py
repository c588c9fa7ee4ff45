"""Bicubic resizing in float32 with a single rounding, like torchvision's resize of frames.

PIL's RGB resize rounds and clips twice, which differs by up to 16 levels at hard edges; PIL in
float, channel by channel, takes two to four times as long. Each output row (and then column) is a
weighted sum of a few input rows; a band of adjacent rows is computed as one small matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .reader import Pixels

Floats = npt.NDArray[np.float32]
ROWS = 8  # output rows per product: more would multiply more zeros, fewer make products too small
# Maximum multiplications per product. From 262,144 on, OpenBLAS uses threads, which would compete
# with the decoder's threads for cores.
MAX_WORK = 200_000


@dataclass(frozen=True, eq=False)
class Band:
    """Output positions [start, stop) are `weights` @ input positions [first, last)."""

    start: int
    stop: int
    first: int
    last: int
    weights: Floats


def resize_frame(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize uint8 [rows, columns, 3] to uint8 [height, width, 3].

    Returns the same array if it already has that size.
    """
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    tall = _resize_rows(pixels.reshape(rows, columns * 3), height)
    wide = _resize_columns(tall, columns, width)
    np.clip(np.rint(wide, out=wide), 0, 255, out=wide)
    return wide.astype(np.uint8).reshape(height, width, 3)


def _resize_rows(pixels: Pixels, height: int) -> Floats:
    """Resize uint8 [rows, width] to float32 [height, width]."""
    rows, width = pixels.shape
    bands = _bands(rows, height, 1)
    tallest = max(band.last - band.first for band in bands)
    pieces = math.ceil(ROWS * tallest * width / MAX_WORK)
    piece = -(-width // pieces)
    window = np.zeros((tallest, pieces * piece), np.float32)
    result = np.empty((height, pieces * piece), np.float32)
    for band in bands:
        count = band.last - band.first
        window[:count, :width] = pixels[band.first : band.last]
        np.matmul(
            band.weights,
            window[:count].reshape(count, pieces, piece).swapaxes(0, 1),
            out=result[band.start : band.stop].reshape(-1, pieces, piece).swapaxes(0, 1),
        )
    return result[:, :width]


def _resize_columns(pixels: Floats, columns: int, width: int) -> Floats:
    """Resize float32 [height, columns * 3] to float32 [height, width * 3]."""
    height = len(pixels)
    bands = _bands(columns, width, 3)
    work = max(band.weights.size for band in bands)
    piece = max(1, min(height, MAX_WORK // work))
    result = np.empty((height, width * 3), np.float32)
    whole = height // piece * piece
    for rows in (slice(0, whole), slice(whole, height)):
        if rows.start == rows.stop:
            continue
        size = min(piece, rows.stop - rows.start)
        source = pixels[rows].reshape(-1, size, columns * 3)
        target = result[rows].reshape(-1, size, width * 3)
        for band in bands:
            np.matmul(
                source[..., band.first * 3 : band.last * 3],
                band.weights.T,
                out=target[..., band.start * 3 : band.stop * 3],
            )
    return result


@lru_cache(maxsize=16)  # all frames of a video have the same size
def _bands(size: int, new_size: int, colors: int) -> tuple[Band, ...]:
    """Return the bands for positions with `colors` interleaved values, which share weights."""
    first, last, weights = _bicubic(size, new_size)
    bands = []
    for start in range(0, new_size, ROWS):
        stop = min(start + ROWS, new_size)
        low, high = int(first[start]), int(last[stop - 1])
        dense = np.zeros((stop - start, high - low), np.float32)
        for row, position in enumerate(range(start, stop)):
            count = last[position] - first[position]
            dense[row, first[position] - low : last[position] - low] = weights[position, :count]
        dense = np.kron(dense, np.eye(colors, dtype=np.float32))
        bands.append(Band(start, stop, low, high, dense))
    return tuple(bands)


def _bicubic(
    size: int, new_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return input range [first, last) and weights [new_size, max inputs] of output positions.

    The cubic kernel has a = -0.5 and is widened by the scale when shrinking (antialias).
    """
    scale = size / new_size
    spread = max(scale, 1.0)
    centers = (np.arange(new_size) + 0.5) * scale
    first = np.maximum(centers - 2 * spread + 0.5, 0).astype(np.int64)
    last = np.minimum(centers + 2 * spread + 0.5, size).astype(np.int64)
    inputs = first[:, None] + np.arange((last - first).max())
    away = np.abs(inputs + 0.5 - centers[:, None]) / spread
    near = (1.5 * away - 2.5) * away**2 + 1
    far = ((-0.5 * away + 2.5) * away - 4) * away + 2
    weights = np.where(away < 1, near, np.where(away < 2, far, 0.0)) * (inputs < last[:, None])
    return first, last, weights / weights.sum(axis=1, keepdims=True)
