"""Synthetic images and videos, and a loader without an engine, for tests and benchmarks."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
from PIL import Image

from octavo.engine.config.engine_config import PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.media.decode.reader import Pixels
from octavo.engine.media.item import MediaItem, PatchShape
from octavo.engine.media.loader import MediaLoader
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.source import MediaAccess
from octavo.engine.media.task import MediaTask
from octavo.engine.media.token_budget import MediaTokenBudget

SHAPE = PatchShape(14, 2, 2, 4, 1536)  # Qwen2-VL 2B


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return smooth shapes with grain, which compress about as well as photographs."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), np.uint8)
    smooth = Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 4, (height, width, 1)).astype(np.int16)
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))


def mp4(num_frames: int, rate: int = 10, size: tuple[int, int] = (64, 48)) -> bytes:
    """Return an MP4 clip whose frame i has the gray level 8 * i % 256."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(num_frames):
            level = np.full((size[1], size[0], 3), 8 * i % 256, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def without_late_frames(video: bytes) -> bytes:
    """Corrupt an MP4 file so that its header and first frames are readable and the rest is not."""
    end = video.index(b"moov") - 4  # end of the frames: the index follows them
    return video[: end // 2] + bytes(end - end // 2) + video[end:]


def load(
    kind: str,
    source: Any,
    options: MediaOptions | None = None,
    preprocess: PreprocessConfig | None = None,
    access: MediaAccess | None = None,
    limits: MediaLimits | None = None,
    max_model_len: int = 128_000,
) -> tuple[MediaItem, Pixels]:
    """Load an item; return it with the pixels [frames, height, width, 3] of all its units."""
    loader = MediaLoader(
        preprocess or PreprocessConfig(), SHAPE, access or MediaAccess(), limits or MediaLimits()
    )
    budget = MediaTokenBudget(max_model_len, 0, 1, SHAPE.factor)
    task = MediaTask(limits or MediaLimits())
    try:
        opened = loader.open(kind, source, options or MediaOptions(), budget, kind, task)
    except BaseException:
        task.close()
        raise
    units = list(loader.units([opened], task))
    return opened.item, np.concatenate([unit.pixels for unit in units])
