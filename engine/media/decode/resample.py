"""Bicubic resizing in float32, with one rounding at the end, as torchvision resizes frames.

PIL's own RGB resize rounds and clips twice, which differs by up to 16 levels at hard edges; PIL in
float, colour by colour, takes two to four times as long as this. Each output row (and then column)
is a weighted sum of a few input rows: sums of neighbouring rows are one small matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .reader import Pixels

Floats = npt.NDArray[np.float32]
ROWS = 8  # output rows of a product: more of them meet more zeros, fewer keep products too small
MAX_WORK = 200_000  # multiplications of a product: from 262,144 on, OpenBLAS wakes its threads,
# which then fight the decoder's for the cores


@dataclass(frozen=True, eq=False)
class Band:
    """Output places [start, stop) are `weights` @ input places [first, last)."""

    start: int
    stop: int
    first: int
    last: int
    weights: Floats


def resize_frame(pixels: Pixels, height: int, width: int) -> Pixels:
    """uint8 [height, width, 3] of uint8 [any, any, 3]; the same array where the size is right."""
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    tall = _resize_rows(pixels.reshape(rows, columns * 3), height)
    wide = _resize_columns(tall, columns, width)
    np.clip(np.rint(wide, out=wide), 0, 255, out=wide)
    return wide.astype(np.uint8).reshape(height, width, 3)


def _resize_rows(pixels: Pixels, height: int) -> Floats:
    """float32 [height, width] of uint8 [any, width]."""
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
    """float32 [height, width * 3] of float32 [height, columns * 3]."""
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


@lru_cache(maxsize=16)  # a video's frames are all of one size
def _bands(size: int, new_size: int, colors: int) -> tuple[Band, ...]:
    """Of places with `colors` values each, which are weighted alike."""
    first, last, weights = _bicubic(size, new_size)
    bands = []
    for start in range(0, new_size, ROWS):
        stop = min(start + ROWS, new_size)
        low, high = int(first[start]), int(last[stop - 1])
        dense = np.zeros((stop - start, high - low), np.float32)
        for row, place in enumerate(range(start, stop)):
            count = last[place] - first[place]
            dense[row, first[place] - low : last[place] - low] = weights[place, :count]
        dense = np.kron(dense, np.eye(colors, dtype=np.float32))
        bands.append(Band(start, stop, low, high, dense))
    return tuple(bands)


def _bicubic(
    size: int, new_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """First and last input place of each output place, and its weights [new_size, most places].

    The cubic of a = -0.5, as wide as two output places where the picture shrinks (antialias).
    """
    scale = size / new_size
    spread = max(scale, 1.0)
    centers = (np.arange(new_size) + 0.5) * scale
    first = np.maximum(centers - 2 * spread + 0.5, 0).astype(np.int64)
    last = np.minimum(centers + 2 * spread + 0.5, size).astype(np.int64)
    places = first[:, None] + np.arange((last - first).max())
    away = np.abs(places + 0.5 - centers[:, None]) / spread
    near = (1.5 * away - 2.5) * away**2 + 1
    far = ((-0.5 * away + 2.5) * away - 4) * away + 2
    weights = np.where(away < 1, near, np.where(away < 2, far, 0.0)) * (places < last[:, None])
    return first, last, weights / weights.sum(axis=1, keepdims=True)
