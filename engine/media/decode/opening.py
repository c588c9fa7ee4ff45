"""Opens a file in this process: which reader is for it."""

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

# Opens a file: ("image", "video" or "frame", which is an image of a video; file, limits, field).
OpenReader = Callable[[str, BinaryIO | Image.Image, MediaLimits, str], MediaReader]


def open_here(
    kind: str, file: BinaryIO | Image.Image, limits: MediaLimits, field: str
) -> MediaReader:
    """A reader in this process. Raises `InputError`."""
    if kind in ("image", "frame"):
        return ImageFile(file, limits, field, is_frame=kind == "frame")
    if isinstance(file, Image.Image):
        raise InputError(field, "is one image; a video is a file or a list of frames")
    return open_video(file, limits, field)


def open_video(file: BinaryIO, limits: MediaLimits, field: str) -> MediaReader:
    """A reader of a video file, or of an animated image. Raises `InputError`."""
    if is_animation(file):
        return AnimationFile(file, limits, field)
    return VideoFile(file, limits, field)
