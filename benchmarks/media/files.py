"""Hand-written image files with exact samples, in variants that no available encoder writes.

Samples are integers of the file's own bit depth, so that tests can compute each expected pixel.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[Any]  # [height, width] or [height, width, channels]
GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # PNG color types
PNG_CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGB_ALPHA: 4}
# Per pass: first row, first column, row step, column step.
ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)


def png(
    samples: Samples,
    depth: int,
    color: int,
    transparent: Sequence[int] | bytes = (),
    palette: bytes = b"",
    interlaced: bool = False,
) -> bytes:
    """Encode a PNG; `transparent` has the transparent color's samples, or a palette's alphas."""
    height, width = samples.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    chunks = [(b"IHDR", head)]
    if palette:
        chunks.append((b"PLTE", palette))
    if len(transparent):
        known = isinstance(transparent, bytes)
        clear = transparent if known else struct.pack(f">{len(transparent)}H", *transparent)
        chunks.append((b"tRNS", bytes(clear)))
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    data = b"".join(_png_rows(samples[r::dr, c::dc], depth) for r, c, dr, dc in passes)
    chunks += [(b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _png_rows(samples: Samples, depth: int) -> bytes:
    if not samples.size:
        return b""
    return b"".join(b"\0" + packed(row, depth, ">") for row in samples)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def packed(row: Samples, depth: int, order: str = "<") -> bytes:
    """Pack a row's samples from the highest bit on, padded to a whole byte."""
    flat = row.reshape(-1)
    if depth in (8, 16, 32, 64):
        kind = flat.dtype.kind if flat.dtype.kind in "if" else "u"
        return flat.astype(f"{order}{kind}{depth // 8}").tobytes()
    bits = (flat[:, None].astype(np.int64) >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def _reversed_bits(data: bytes) -> bytes:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return np.packbits(bits).tobytes()


def tiff(
    samples: Samples,
    depth: int,
    photometric: int,
    sample_format: int = 1,
    order: str = "<",
    extra: Sequence[int] = (),
    planar: bool = False,
    palette: Sequence[int] = (),
    fill_order: int = 1,
    deflate: bool = False,
) -> bytes:
    """Encode a TIFF with one strip per plane.

    `photometric`: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK; `sample_format`:
    1 unsigned, 2 signed, 3 float; `extra`: 1 premultiplied alpha, 2 straight alpha.
    """
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    whole = samples.reshape(height, width, channels)
    layers = [whole[..., i] for i in range(channels)] if planar else [whole]
    strips = [b"".join(packed(row, depth, order) for row in layer) for layer in layers]
    if deflate:
        strips = [zlib.compress(strip) for strip in strips]
    if fill_order == 2:
        strips = [_reversed_bits(strip) for strip in strips]
    offsets = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    entries: list[tuple[int, str, Sequence[int]]] = [
        (256, "H", [width]),
        (257, "H", [height]),
        (258, "H", [depth] * channels),
        (259, "H", [8 if deflate else 1]),
        (262, "H", [photometric]),
        (266, "H", [fill_order]),
        (273, "I", offsets),
        (277, "H", [channels]),
        (278, "H", [height]),
        (279, "I", [len(strip) for strip in strips]),
        (284, "H", [2 if planar else 1]),
        (320, "H", palette),
        (338, "H", extra),
        (339, "H", [sample_format] * channels),
    ]
    body = b"".join(strips)
    body += b"\0" * (len(body) % 2)
    return _directory(body, [entry for entry in entries if len(entry[2])], order)


def _directory(body: bytes, entries: Sequence[tuple[int, str, Sequence[int]]], order: str) -> bytes:
    """Assemble the file: header, pixels, values too long for an entry, and the entries."""
    at, values, lines = 8 + len(body), b"", b""
    for tag, kind, numbers in entries:
        data = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(data) > 4:
            offset, values = at + len(values), values + data + b"\0" * (len(data) % 2)
            data = struct.pack(f"{order}I", offset)
        code = {"H": 3, "I": 4}[kind]
        lines += struct.pack(f"{order}HHI", tag, code, len(numbers)) + data.ljust(4, b"\0")
    start = at + len(values)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, start)
    return head + body + values + struct.pack(f"{order}H", len(entries)) + lines + bytes(4)


def bmp(
    pixels: Samples,
    bits: int,
    masks: Sequence[int] = (),
    header_bytes: int = 40,
    rows_down: bool = False,
) -> bytes:
    """Encode a BMP; `pixels` are `bits` wide, split by the masks of red, green, blue and alpha."""
    height, width = pixels.shape
    rows = pixels if rows_down else pixels[::-1]
    data = b""
    for row in rows:
        line = row.astype(f"<u{bits // 8}").tobytes()
        data += line + bytes(-len(line) % 4)
    head = struct.pack(
        "<IiiHHIIiiII",
        header_bytes,
        width,
        -height if rows_down else height,
        1,
        bits,
        3 if masks else 0,
        len(data),
        2835,
        2835,
        0,
        0,
    )
    tail = b"".join(struct.pack("<I", mask) for mask in masks)
    head += tail.ljust(header_bytes - 40, b"\0") if header_bytes > 40 else tail
    size = 14 + len(head)
    return b"BM" + struct.pack("<IHHI", size + len(data), 0, 0, size) + head + data
