"""Animated GIF and WebP files as videos: frame after frame, each composed on white."""

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

BROKEN = "the animation is broken: it cannot be decoded"
SHORTEST_MS = 20  # what is to be shown for less, browsers show for
USUAL_MS = 100


class AnimationFile:
    """An animated image, as a `MediaReader`. It closes the file."""

    def __init__(self, file: BinaryIO, limits: MediaLimits, field: str) -> None:
        """Goes through all frames once, for their times. Raises `InputError`."""
        self._file, self._limits, self._field = file, limits, field
        self._times, lasts = [], 0.0
        for image in self._composed():
            milliseconds = image.info.get("duration", 0)
            self._times.append(lasts)
            lasts += (milliseconds if milliseconds >= SHORTEST_MS else USUAL_MS) / 1000
            limits.check_duration(lasts, field)
            width, height = image.size
        self.header = MediaHeader(height, width, len(self._times), len(self._times) / lasts)

    def _composed(self) -> Iterator[Image.Image]:
        """Each frame as it is seen, one object that changes. Raises `InputError`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                self._file.seek(0)
                image = Image.open(self._file, formats=("GIF", "WEBP"))
            self._limits.check_size(*image.size, self._field)
            for place in range(getattr(image, "n_frames", 1)):
                image.seek(place)
                image.load()
                yield image
        except InputError:
            raise
        except Exception:  # decoders raise all kinds; their texts may tell of memory
            raise InputError(self._field, BROKEN) from None

    def times(self, indices: Sequence[int]) -> list[float]:
        return [self._times[index] for index in indices]

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        wanted = iter(indices)
        expected = next(wanted, None)
        for place, image in enumerate(self._composed()):
            if expected is None:
                return
            if place == expected:
                yield Frame(place, resize_frame(np.asarray(to_rgb(image)), height, width))
                expected = next(wanted, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def is_animation(file: BinaryIO) -> bool:
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    return head[:6] in (b"GIF87a", b"GIF89a") or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
