"""How a checkpoint's pictures become patches.

Sources: `preprocessor_config.json` and `video_preprocessor_config.json` of a Hugging Face Qwen2-VL
folder; constants of qwen-vl-utils.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .config_error import ConfigError
from .config_fields import Fields
from .json_files import read_json

MAX_PIXELS, MAX_FRAMES = 1 << 40, 1 << 24  # that a checkpoint may ask for
TOKEN_PIXELS = 28 * 28  # pixels behind one image token of the real models


@dataclass(frozen=True)
class PreprocessConfig:
    """How pictures become patches. Pixels are height × width of one image or one video frame."""

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
        """The checkpoint's settings; what its files leave out is qwen-vl-utils' default.

        Limits of videos come from a `video_preprocessor_config.json` that names them, as the
        embedded model's does. What transformers writes under `size` there are the image's limits,
        which qwen-vl-utils does not use for videos.
        """
        whole = Fields(
            read_json(path / "processor_config.json", missing_ok=True), "processor_config"
        )
        given = read_json(path / "preprocessor_config.json", missing_ok=True)
        image = Fields(
            {**whole.section("image_processor").raw, **given}, "preprocessor_config.json"
        )
        name = "video_preprocessor_config.json"
        video = Fields(read_json(path / name, missing_ok=True), name)
        size = image.section("size")  # newer writers keep the limits there
        least = image if image.raw.get("min_pixels") else size
        most = image if image.raw.get("max_pixels") else size
        low, high = "min_pixels", "max_pixels"
        found = cls(
            min_pixels=_pixels(least, low if least is image else "shortest_edge", cls.min_pixels),
            max_pixels=_pixels(most, high if most is image else "longest_edge", cls.max_pixels),
            video_min_pixels=_pixels(video, low, cls.video_min_pixels),
            video_max_pixels=_pixels(video, high, cls.video_max_pixels),
            fps=video.number("fps", 0, 1000, cls.fps),
            min_frames=video.integer("min_frames", 1, MAX_FRAMES, cls.min_frames),
            max_frames=video.integer("max_frames", 1, MAX_FRAMES, cls.max_frames),
            image_mean=_channels(image, "image_mean", cls.image_mean),
            image_std=_channels(image, "image_std", cls.image_std),
        )
        for what in ("pixels", "frames", "video_pixels"):
            start, _, end = what.rpartition("_")
            low, high = (f"{start}{'_' if start else ''}{side}_{end}" for side in ("min", "max"))
            if getattr(found, low) > getattr(found, high):
                raise ConfigError(
                    f"{path}: {low}={getattr(found, low)} of its preprocessors is over "
                    f"{high}={getattr(found, high)}"
                )
        if not all(found.image_std):
            raise image.error("image_std", "must not be 0")
        return found

    def limited(self, min_pixels: int | None, max_pixels: int | None) -> PreprocessConfig:
        """With the caller's limits of an image in place of the checkpoint's."""
        low = min_pixels or min(self.min_pixels, max_pixels or 2**62)
        high = max_pixels or max(self.max_pixels, min_pixels or 0)
        if low > high:
            raise ConfigError(f"min_pixels={low}: over max_pixels={high}")
        return replace(self, min_pixels=low, max_pixels=high)


def _pixels(fields: Fields, name: str, default: int) -> int:
    return fields.integer(name, 1, MAX_PIXELS, default)


def _channels(
    fields: Fields, name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    value = fields.raw.get(name, default)
    are_numbers = isinstance(value, list | tuple) and all(
        type(each) in (int, float) and -1e6 < each < 1e6 for each in value
    )
    if not are_numbers or len(value) != 3:
        raise fields.error(name, "must be three numbers")
    return value[0], value[1], value[2]
