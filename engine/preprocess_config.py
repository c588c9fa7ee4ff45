"""How a checkpoint's pictures become patches.

Sources: `preprocessor_config.json` and `video_preprocessor_config.json` of a Hugging Face Qwen2-VL
folder; constants of qwen-vl-utils.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config_error import ConfigError
from .json_files import read_json

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
        whole = read_json(path / "processor_config.json", missing_ok=True)  # newer writers
        image = whole.get("image_processor") or {}
        image = {**image, **read_json(path / "preprocessor_config.json", missing_ok=True)}
        video = read_json(path / "video_preprocessor_config.json", missing_ok=True)
        size = image.get("size") or {}  # newer writers keep the limits there
        found: dict[str, Any] = {
            "min_pixels": image.get("min_pixels") or size.get("shortest_edge"),
            "max_pixels": image.get("max_pixels") or size.get("longest_edge"),
            "video_min_pixels": video.get("min_pixels"),
            "video_max_pixels": video.get("max_pixels"),
        }
        found |= {name: tuple(image[name]) for name in ("image_mean", "image_std") if name in image}
        found |= {name: video.get(name) for name in ("fps", "min_frames", "max_frames")}
        for name, value in found.items():
            if value and not isinstance(value, int | float | tuple):
                raise ConfigError(f"{path}: {name}={value!r} in its preprocessors' configurations")
        return cls(**{name: value for name, value in found.items() if value})

    def limited(self, min_pixels: int | None, max_pixels: int | None) -> PreprocessConfig:
        """With the caller's limits of an image in place of the checkpoint's."""
        low = min_pixels or min(self.min_pixels, max_pixels or 2**62)
        high = max_pixels or max(self.max_pixels, min_pixels or 0)
        if low > high:
            raise ConfigError(f"min_pixels={low}: over max_pixels={high}")
        return replace(self, min_pixels=low, max_pixels=high)
