"""How a file's pixels are made: its header first, then the frames that were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # [frames, height, width, 3], or [height, width, 3] of one frame


@dataclass(frozen=True)
class MediaHeader:
    """What is known of a file before any pixel of it is made."""

    height: int  # as it is seen: after turning
    width: int
    num_frames: int = 1
    fps: float = 1.0  # frames a second, on average; of no meaning for an image


@dataclass(frozen=True, eq=False)
class Frame:
    index: int  # among the file's frames
    pixels: Pixels  # uint8 [height, width, 3], RGB


class MediaReader(Protocol):
    """An open image or video file; a context manager. All methods raise `InputError`."""

    @property
    def header(self) -> MediaHeader: ...

    def times(self, indices: Sequence[int]) -> list[float]:
        """When those frames are shown, in seconds from the first one."""
        ...

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        """The frames of `indices`, which rise, resized to `height` × `width`, one after another.

        Fewer come where the file holds fewer than its header says.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
