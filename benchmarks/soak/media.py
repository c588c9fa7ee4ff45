"""Valid and broken images and videos sent by the soak's clients."""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from octavo.benchmarks.demo_model.draw import draw_shape
from octavo.benchmarks.demo_model.paint import COLORS, SHAPES
from octavo.benchmarks.media.cases import encoded
from octavo.benchmarks.media.video_cases import clip

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SIZES = ((56, 56), (160, 120), (200, 330), (448, 224), (640, 480))


@dataclass(frozen=True)
class MediaFile:
    """A file's bytes and its name in requests."""

    name: str
    mime: str
    data: bytes

    @property
    def data_uri(self) -> str:
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class MediaSet:
    """The files of one client process; `folder` contains each under its name."""

    images: tuple[MediaFile, ...]
    videos: tuple[MediaFile, ...]
    folder: Path


def make_media(folder: Path) -> MediaSet:
    """Write the media files; they are the same on every call."""
    rng = random.Random(1)
    images = [draw_image(rng, size, form) for size in SIZES for form in FORMATS]
    videos = [
        MediaFile("short.mp4", "video/mp4", clip(num_frames=24)),
        MediaFile("mpeg4.mkv", "video/x-matroska", clip("mpeg4", "matroska", num_frames=48)),
        MediaFile("wide.mp4", "video/mp4", clip(num_frames=36, size=(320, 180))),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*images, *videos):
        (folder / file.name).write_bytes(file.data)
    return MediaSet(tuple(images), tuple(videos), folder)


def draw_image(rng: random.Random, size: tuple[int, int], form: str = "PNG") -> MediaFile:
    """Draw one shape; the pixels are different in each call."""
    seed = rng.getrandbits(60)
    color, shape = rng.choice(COLORS), rng.choice(SHAPES)
    image = draw_shape(np.random.default_rng(seed), size, color, shape).image
    if form == "PNG" and rng.random() < 0.5:
        image.putalpha(200)
    name = f"{size[0]}x{size[1]}-{seed}.{form.lower()}"
    return MediaFile(name, f"image/{form.lower()}", encoded(image, form))


def broken_image(rng: random.Random, files: MediaSet) -> bytes:
    """Return bytes that do not decode to a valid image."""
    data = rng.choice(files.images).data
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randint(1, max(2, len(data) // 4))]
    if kind == 1:
        return rng.randbytes(rng.randint(1, 5000))
    if kind == 2:
        return data[:8] + rng.randbytes(200)
    return encoded(Image.new("RGB", (1, 400)))  # aspect ratio above 200


def broken_video(rng: random.Random, files: MediaSet) -> bytes:
    """Return a video file without its index, or random bytes."""
    data = rng.choice(files.videos).data
    return data[: len(data) // 8] if rng.random() < 0.5 else rng.randbytes(3000)
