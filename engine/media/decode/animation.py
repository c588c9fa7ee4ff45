"""Decode animated GIF and WebP files as videos; frames are composed on white."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Self

import numpy as np
from PIL import Image

from ...config.media_limits import MediaLimits
from ...errors import InputError
from .image import to_rgb
from .reader import Frame, MediaHeader
from .resample import resize_frame

BROKEN = "the animation is corrupt: it cannot be decoded"
MIN_MS = 20  # browsers show frames with a shorter duration for DEFAULT_MS
DEFAULT_MS = 100


class AnimationFile:
    """`MediaReader` of an animated image. It closes the file."""

    def __init__(self, file: BinaryIO, limits: MediaLimits, field: str) -> None:
        """Decode all frames once, to read their times.

        Raises `InputError` if the file is corrupt or too large.
        """
        self._file, self._limits, self._field = file, limits, field
        self._times, duration = [], 0.0
        for image in self._composed():
            milliseconds = image.info.get("duration", 0)
            self._times.append(duration)
            duration += (milliseconds if milliseconds >= MIN_MS else DEFAULT_MS) / 1000
            limits.check_duration(duration, field)
            width, height = image.size
        self.header = MediaHeader(height, width, len(self._times), len(self._times) / duration)

    def _composed(self) -> Iterator[Image.Image]:
        """Yield each frame as displayed; the yielded object is reused. Raises `InputError`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                self._file.seek(0)
                image = Image.open(self._file, formats=("GIF", "WEBP"))
            self._limits.check_size(*image.size, self._field)
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                image.load()
                yield image
        except InputError:
            raise
        except Exception:  # of any type; its text may reveal memory, so it is not shown
            raise InputError(self._field, BROKEN) from None

    def times(self, indices: Sequence[int]) -> list[float]:
        return [self._times[index] for index in indices]

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        wanted = iter(indices)
        expected = next(wanted, None)
        for index, image in enumerate(self._composed()):
            if expected is None:
                return
            if index == expected:
                yield Frame(index, resize_frame(np.asarray(to_rgb(image)), height, width))
                expected = next(wanted, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def is_animation(file: BinaryIO) -> bool:
    """Return whether a file is a GIF or WebP, animated or not."""
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    return head[:6] in (b"GIF87a", b"GIF89a") or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
