"""Interface of media readers: the header first, then the selected frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # [frames, height, width, 3], or [height, width, 3] for one frame


@dataclass(frozen=True)
class MediaHeader:
    """Properties of a file, known before its pixels are decoded."""

    height: int  # after orientation is applied
    width: int
    num_frames: int = 1
    fps: float = 1.0  # average frames per second; unused for an image


@dataclass(frozen=True, eq=False)
class Frame:
    """A decoded frame."""

    index: int  # in the file
    pixels: Pixels  # uint8 [height, width, 3], RGB


class MediaReader(Protocol):
    """An open image or video file; a context manager. All methods raise `InputError`."""

    @property
    def header(self) -> MediaHeader: ...

    def times(self, indices: Sequence[int]) -> list[float]:
        """Return the times of the frames, in seconds after the first frame of the file."""
        ...

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        """Yield the frames of the ascending `indices`, resized to `height` × `width`.

        Frames that are missing from the file are skipped.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
