"""Read the size of a WebP image from its first bytes.

Pillow allocates two canvases, 8 bytes per pixel, when it opens a file.
"""

from __future__ import annotations

from typing import BinaryIO

from .reader import MediaHeader


def webp_header(file: BinaryIO) -> MediaHeader | None:
    """Return the declared size of a WebP image; None for other files. Keeps the position."""
    position = file.tell()
    file.seek(0)
    head = file.read(30)
    file.seek(position)
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    kind = head[12:16]
    if kind == b"VP8X":  # 24 bits each, minus 1
        return MediaHeader(1 + _number(head[27:30]), 1 + _number(head[24:27]))
    if kind == b"VP8L":  # 14 bits each, minus 1, after a signature byte
        bits = _number(head[21:25])
        return MediaHeader(1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF))
    if kind == b"VP8 ":  # 14 bits each, and 2 bits of scale
        return MediaHeader(_number(head[28:30]) & 0x3FFF, _number(head[26:28]) & 0x3FFF)
    return None


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
