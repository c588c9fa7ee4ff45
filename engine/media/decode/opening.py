"""Open a file in this process with the reader for its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

from PIL import Image

from ...config.media_limits import MediaLimits
from ...errors import InputError
from .animation import AnimationFile, is_animation
from .image import ImageFile
from .reader import MediaReader
from .video import VideoFile

# (kind, file, limits, field) -> reader; kind is "image", "video" or "frame" (an image in a video).
OpenReader = Callable[[str, BinaryIO | Image.Image, MediaLimits, str], MediaReader]


def open_here(
    kind: str, file: BinaryIO | Image.Image, limits: MediaLimits, field: str
) -> MediaReader:
    """Open a file or PIL image in this process. Raises `InputError` if it is invalid."""
    if kind in ("image", "frame"):
        return ImageFile(file, limits, field, is_frame=kind == "frame")
    if isinstance(file, Image.Image):
        raise InputError(field, "is a single image; pass a video file or a list of frames")
    return open_video(file, limits, field)


def open_video(file: BinaryIO, limits: MediaLimits, field: str) -> MediaReader:
    """Open a video file or an animated image. Raises `InputError` if it is invalid."""
    if is_animation(file):
        return AnimationFile(file, limits, field)
    return VideoFile(file, limits, field)
