"""Limits on the images and videos of a request, for every API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ..errors import InputError


def setting(name: str) -> str:
    """Return the name of a setting as an option of `octavo serve` and an argument of `LLM`."""
    return f"--{name.replace('_', '-')} of octavo serve, {name}= of LLM"


@dataclass(frozen=True)
class MediaLimits:
    """Media limits, independent of the source.

    Each field is a setting of `EngineConfig` and an option of `octavo serve`; errors name both.
    """

    max_media_bytes: int = 1 << 30  # of one file, and of all files of a request
    max_media_pixels: int = 120_000_000  # of one decoded image or video frame
    max_video_frames: int = 2048  # sampled from one video file, or passed as a list
    max_video_seconds: int = 3 * 3600  # duration of a video file
    max_media_items: int = 256  # images and videos of one request
    fetch_timeout_s: int = 60  # for one URL, including DNS, redirects and the download
    media_timeout_s: int = 600  # for preprocessing all media of one request
    decoder_memory_bytes: int = 4 << 30  # address space of a decoder process

    def refuse(self, name: str, field: str, found: str) -> NoReturn:
        """Raise `InputError` because `found` exceeds the limit `name`."""
        text = f"{found}; the maximum is {getattr(self, name)}"
        raise InputError(field, f"{text} ({setting(name)})")

    def check_bytes(self, count: int, field: str) -> None:
        if count == 0:
            raise InputError(field, "has no bytes")
        if count > self.max_media_bytes:
            self.refuse("max_media_bytes", field, f"{count} bytes")

    def check_size(self, width: int, height: int, field: str) -> None:
        """Raise `InputError` if a decoded image or frame of this size exceeds the limit."""
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
