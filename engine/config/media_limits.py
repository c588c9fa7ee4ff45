"""What a request's images and videos may be, by whatever way they come in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ..errors import InputError


def setting(name: str) -> str:
    """A setting as whoever runs the engine says it."""
    return f"--{name.replace('_', '-')} of octavo serve, {name}= of LLM"


@dataclass(frozen=True)
class MediaLimits:
    """One object for all sources. Each field is a setting of `EngineConfig` and a flag of
    `octavo serve`, which a refusal names."""

    max_media_bytes: int = 1 << 30  # of one file, and of all that a request brings or has fetched
    max_media_pixels: int = 120_000_000  # of one image or one frame of a video, decoded
    max_video_frames: int = 2048  # taken of one video file, or given as a list
    max_video_seconds: int = 3 * 3600  # that a video file lasts
    max_media_items: int = 256  # images and videos of one request
    fetch_timeout_s: int = 60  # to fetch one URL: names, redirects, connection and all its bytes
    media_timeout_s: int = 600  # to make all items of one request ready
    decoder_memory_bytes: int = 4 << 30  # address space of a process that decodes remote files

    def refuse(self, name: str, field: str, found: str) -> NoReturn:
        """Raises the `InputError` of limit `name`, which `found` is over."""
        text = f"{found}; at most {getattr(self, name)} are taken"
        raise InputError(field, f"{text} ({setting(name)})")

    def check_bytes(self, count: int, field: str) -> None:
        if count == 0:
            raise InputError(field, "has no bytes")
        if count > self.max_media_bytes:
            self.refuse("max_media_bytes", field, f"{count} bytes")

    def check_size(self, width: int, height: int, field: str) -> None:
        """Pixels that an image or a frame decodes to."""
        if width < 1 or height < 1:
            raise InputError(field, f"{width}×{height} pixels: has no size")
        if width * height > self.max_media_pixels:
            self.refuse("max_media_pixels", field, f"{width}×{height} pixels")

    def check_duration(self, seconds: float, field: str) -> None:
        if seconds > self.max_video_seconds:
            self.refuse("max_video_seconds", field, f"{seconds:.0f} seconds of video")

    def check_frames(self, count: int, field: str) -> None:
        if count > self.max_video_frames:
            self.refuse("max_video_frames", field, f"{count} frames")
