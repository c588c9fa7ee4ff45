"""Settings for converting images and videos to patches.

Sources: `preprocessor_config.json` and `video_preprocessor_config.json` of a Hugging Face Qwen2-VL
folder; constants of qwen-vl-utils.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError
from .json_fields import JsonFields
from .json_files import read_json

MAX_PIXELS = 1 << 40
MAX_FRAMES = 1 << 20
TOKEN_PIXELS = 28 * 28  # pixels per image token of Qwen2-VL


@dataclass(frozen=True)
class PreprocessConfig:
    """Image and video preprocessing. Pixels are height × width of one image or video frame."""

    min_pixels: int = 4 * TOKEN_PIXELS
    max_pixels: int = 16384 * TOKEN_PIXELS
    video_min_pixels: int = 128 * TOKEN_PIXELS
    video_max_pixels: int = 768 * TOKEN_PIXELS
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dir(cls, path: Path) -> PreprocessConfig:
        """Read the checkpoint's settings, with the defaults of qwen-vl-utils.

        Video limits are only read from min_pixels and max_pixels of
        `video_preprocessor_config.json`. Under `size`, transformers writes the image limits there,
        which qwen-vl-utils does not use for videos.
        """
        newer = _fields(path, "processor_config.json").nested("image_processor")
        older = _fields(path, "preprocessor_config.json")
        image = JsonFields({**newer.raw, **older.raw}, older.file)
        video = _fields(path, "video_preprocessor_config.json")
        size = image.nested("size")  # location of the limits in newer checkpoints
        found = cls(
            min_pixels=_pixels(image, "min_pixels", _pixels(size, "shortest_edge", cls.min_pixels)),
            max_pixels=_pixels(image, "max_pixels", _pixels(size, "longest_edge", cls.max_pixels)),
            video_min_pixels=_pixels(video, "min_pixels", cls.video_min_pixels),
            video_max_pixels=_pixels(video, "max_pixels", cls.video_max_pixels),
            fps=video.number("fps", 1e-3, 1e3, cls.fps),
            min_frames=video.integer("min_frames", 1, MAX_FRAMES, cls.min_frames),
            max_frames=video.integer("max_frames", 1, MAX_FRAMES, cls.max_frames),
            image_mean=_channels(image, "image_mean", -10, cls.image_mean),
            image_std=_channels(image, "image_std", 1e-6, cls.image_std),
        )
        if found.min_pixels > found.max_pixels:
            raise image.error("min_pixels", f"must be at most max_pixels={found.max_pixels}")
        if found.video_min_pixels > found.video_max_pixels:
            raise video.error("min_pixels", f"must be at most max_pixels={found.video_max_pixels}")
        if found.min_frames > found.max_frames:
            raise video.error("min_frames", f"must be at most max_frames={found.max_frames}")
        return found

    def limited(self, min_pixels: int | None, max_pixels: int | None) -> PreprocessConfig:
        """Return a copy with the image limits overridden. Raises `ConfigError`."""
        low = min_pixels or min(self.min_pixels, max_pixels or 2**62)
        high = max_pixels or max(self.max_pixels, min_pixels or 0)
        if low > high:
            raise ConfigError(f"min_pixels={low}: must be at most max_pixels={high}")
        return replace(self, min_pixels=low, max_pixels=high)


def _fields(folder: Path, name: str) -> JsonFields:
    return JsonFields(read_json(folder / name, missing_ok=True), str(folder / name))


def _pixels(fields: JsonFields, name: str, default: int) -> int:
    return fields.integer(name, 1, MAX_PIXELS, default)


def _channels(
    fields: JsonFields, name: str, low: float, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    red, green, blue = fields.numbers(name, 3, low, 10) or default
    return red, green, blue
