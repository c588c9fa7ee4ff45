"""Validate the engine's media settings before the model is loaded."""

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
    """Validated media settings of an engine."""

    access: MediaAccess
    limits: MediaLimits
    preprocess: PreprocessConfig  # the checkpoint's, with the engine's min_pixels and max_pixels
    defaults: Mapping[str, MediaOptions]  # by kind ("image", "video")


def media_settings(config: EngineConfig, model: ModelConfig) -> MediaSettings:
    """Build the media settings. Raises `ConfigError` if they are invalid or contradictory."""
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
            text = f"must be at least {token} (one token)"
            raise ConfigError(f"{name}={pixels}: {text}")
    defaults = {"image": images, "video": videos}
    return MediaSettings(_read_access(config), limits, preprocess, defaults)


def _read_options(config: EngineConfig, kind: str) -> MediaOptions:
    name = f"{kind}_options"
    given: Any = getattr(config, name)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}: must be a dict, not {type(given).__name__}")
    for reserved in ("type", kind):  # keys of a message part, which `from_part` skips
        if reserved in given:
            raise ConfigError(f"{name}: {reserved!r} is not an option; remove it")
    try:
        return MediaOptions.from_part(given, kind, name)
    except InputError as error:
        raise ConfigError(f"{error} (--{kind}-option)") from None


def _check_pixels(config: EngineConfig, images: MediaOptions) -> None:
    """Check `min_pixels` and `max_pixels`, which may be set directly or in `image_options`."""
    pixels = {name: getattr(config, name) for name in ("min_pixels", "max_pixels")}
    own = {name: value for name, value in pixels.items() if value is not None}
    for name, value in own.items():
        if name in images.given:
            raise ConfigError(f"{name}={value}: is also set in image_options; set it only once")
    try:
        MediaOptions.from_part(images.given | own, "image", "image_options")
    except InputError as error:
        raise ConfigError(f"{error} (--min-pixels, --max-pixels, --image-option)") from None


def _read_access(config: EngineConfig) -> MediaAccess:
    """Read the allow-lists; a string is accepted as a list of one."""
    paths: Any = config.allowed_media_paths
    domains: Any = config.allowed_media_domains
    paths = (paths,) if isinstance(paths, str | Path) else paths
    domains = (domains,) if isinstance(domains, str) else domains
    return media_access(tuple(paths or ()), tuple(domains), local=paths is None)
