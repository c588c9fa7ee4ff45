"""What the engine's settings say of images and videos, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config.engine_config import EngineConfig, ModelConfig, PreprocessConfig
from ..config.media_limits import MediaLimits
from ..errors import ConfigError, InputError
from .options import MediaOptions
from .source import MediaAccess, media_access


@dataclass(frozen=True)
class MediaSettings:
    access: MediaAccess
    limits: MediaLimits
    preprocess: PreprocessConfig  # the checkpoint's, with the settings' limits of an image
    defaults: Mapping[str, MediaOptions]  # by kind: for items whose caller says nothing


def media_settings(config: EngineConfig, model: ModelConfig) -> MediaSettings:
    """Raises `ConfigError` for what contradicts itself, or could be no image's or video's."""
    limits = MediaLimits(**{each.name: getattr(config, each.name) for each in fields(MediaLimits)})
    images, videos = _read_options(config, "image"), _read_options(config, "video")
    _check_pixels(config, images)
    preprocess = PreprocessConfig.from_dir(config.model)
    preprocess = preprocess.limited(config.min_pixels, config.max_pixels)
    token = model.vision.resize_factor**2
    named = {
        "max_pixels": preprocess.max_pixels,
        "image_options.max_pixels": images.max_pixels,
        "video_options.max_pixels": videos.max_pixels,
        "video_options.total_pixels": videos.total_pixels,
    }
    for name, pixels in named.items():
        if pixels is not None and pixels < token:
            text = f"must be at least {token}, which is one token"
            raise ConfigError(f"{name}={pixels}: {text}")
    defaults = {"image": images, "video": videos}
    return MediaSettings(_read_access(config), limits, preprocess, defaults)


def _read_options(config: EngineConfig, kind: str) -> MediaOptions:
    name = f"{kind}_options"
    given: Any = getattr(config, name)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}: must be a dict, not {type(given).__name__}")
    for taken in ("type", kind):  # of a message's part
        if taken in given:
            raise ConfigError(f"{name}: {taken!r} is no option")
    try:
        return MediaOptions.from_part(given, kind, name)
    except InputError as error:
        raise ConfigError(f"{error} (--{kind}-option)") from None


def _check_pixels(config: EngineConfig, images: MediaOptions) -> None:
    """`min_pixels` and `max_pixels` are image options too, and may be given once."""
    pixels = {name: getattr(config, name) for name in ("min_pixels", "max_pixels")}
    own = {name: value for name, value in pixels.items() if value is not None}
    for name, value in own.items():
        if name in images.given:
            raise ConfigError(f"{name}={value}: stands in image_options too; give it once")
    try:
        MediaOptions.from_part(images.given | own, "image", "image_options")
    except InputError as error:
        raise ConfigError(f"{error} (--min-pixels, --max-pixels, --image-option)") from None


def _read_access(config: EngineConfig) -> MediaAccess:
    """A single path or domain may stand for a list of one."""
    paths: Any = config.allowed_media_paths
    domains: Any = config.allowed_media_domains
    paths = (paths,) if isinstance(paths, str | Path) else paths
    domains = (domains,) if isinstance(domains, str) else domains
    return media_access(tuple(paths or ()), tuple(domains), local=paths is None)
