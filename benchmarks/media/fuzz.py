"""Corrupted media files: valid files of every format, truncated and damaged by a seed."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import av
import numpy as np
from PIL import Image

from .cases import encoded, noise


def _image(form: str, mode: str = "RGB", **options: Any) -> Callable[[], bytes]:
    return lambda: encoded(noise(48, 36).convert(mode), form, **options)


def _deep(form: str) -> Callable[[], bytes]:
    gray = np.random.default_rng(0).integers(0, 1 << 16, (36, 48)).astype(np.uint16)
    return lambda: encoded(Image.fromarray(gray), form)


def _turned(form: str) -> Callable[[], bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _image(form, exif=exif)


def _moving(form: str) -> Callable[[], bytes]:
    more = [noise(48, 36, seed=i) for i in range(1, 4)]
    return _image(form, save_all=True, append_images=more, duration=100)


def _clip(form: str, codec: str) -> Callable[[], bytes]:
    def make() -> bytes:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=form) as file:
            stream: Any = file.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for i in range(12):
                frame = av.VideoFrame.from_image(noise(64, 48, seed=i))
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        return buffer.getvalue()

    return make


IMAGES: dict[str, Callable[[], bytes]] = {
    "jpeg": _image("JPEG", quality=90),
    "jpeg progressive": _image("JPEG", progressive=True),
    "jpeg turned": _turned("JPEG"),
    "jpeg cmyk": _image("JPEG", "CMYK"),
    "png": _image("PNG"),
    "png palette": _image("PNG", "P", transparency=3),
    "png deep": _deep("PNG"),
    "png turned": _turned("PNG"),
    "webp": _image("WEBP"),
    "webp lossless": _image("WEBP", "RGBA", lossless=True),
    "webp moving": _moving("WEBP"),
    "gif": _image("GIF"),
    "gif moving": _moving("GIF"),
    "bmp": _image("BMP"),
    "bmp palette": _image("BMP", "P"),
    "tiff": _image("TIFF"),
    "tiff deep": _deep("TIFF"),
    "tiff lzw": _image("TIFF", compression="tiff_lzw"),
    "tiff deflate": _image("TIFF", "RGBA", compression="tiff_adobe_deflate"),
    "tiff jpeg": _image("TIFF", compression="jpeg"),
    "tiff packbits": _image("TIFF", "CMYK", compression="packbits"),
    "tiff fax": _image("TIFF", "1", compression="group4"),
}
VIDEOS: dict[str, Callable[[], bytes]] = {
    "mp4": _clip("mp4", "mpeg4"),
    "mp4 h264": _clip("mp4", "libx264"),
    "mov": _clip("mov", "libx264"),
    "mkv": _clip("matroska", "mpeg4"),
    "mkv hevc": _clip("matroska", "libx265"),
    "webm": _clip("webm", "libvpx-vp9"),
}
FORMS = IMAGES | VIDEOS


@functools.cache
def whole_file(form: str) -> bytes:
    return FORMS[form]()


def broken_files(
    seed: int, count: int, forms: Sequence[str] = tuple(FORMS)
) -> Iterator[tuple[str, bytes]]:
    """Yield `count` damaged files with their formats, cycling through `forms`."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        form = forms[i % len(forms)]
        damage = DAMAGES[rng.integers(len(DAMAGES))]
        yield form, damage(whole_file(form), rng)


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def _flip(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip a few bits anywhere."""
    return _flipped(data, rng, len(data))


def _flip_head(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip a few bits of the header."""
    return _flipped(data, rng, min(len(data), 200))


def _flip_tail(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip a few bits of the end, where some formats store their index."""
    return _flipped(data[::-1], rng, min(len(data), 600))[::-1]


def _flipped(data: bytes, rng: np.random.Generator, size: int) -> bytes:
    damaged = np.frombuffer(data, np.uint8).copy()
    positions = rng.integers(size, size=rng.integers(1, 12))
    damaged[positions] ^= (1 << rng.integers(8, size=len(positions))).astype(np.uint8)
    return damaged.tobytes()


def _overwrite(data: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite a run of bytes with zeros, ones or noise."""
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 64))
    fill = [bytes(size), b"\xff" * size, rng.bytes(size)][rng.integers(3)]
    return data[:at] + fill + data[at + size :]


def _move(data: bytes, rng: np.random.Generator) -> bytes:
    """Remove or duplicate a range of bytes."""
    first, last = sorted(rng.integers(len(data), size=2))
    return data[:first] + data[last:] if rng.integers(2) else data[:last] + data[first:]


DAMAGES = (_cut, _flip, _flip_head, _flip_tail, _overwrite, _move)
