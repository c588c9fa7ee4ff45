"""Read a video that is given as a list of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

from ...errors import InputError
from .reader import Frame, MediaHeader, MediaReader

# Maximum difference of a side from the first frame's: pixels, or share (the larger one counts).
MAX_DIFFERENCE, MAX_SHARE = 8, 0.05
LISTED_FPS = 2.0  # default frames per second


class OpenImage(Protocol):
    """Opens one frame."""

    def __call__(self, source: Any, field: str) -> MediaReader: ...


class FrameList:
    """`MediaReader` of a list of images; each is opened only when it is decoded."""

    def __init__(
        self, sources: Sequence[Any], open_image: OpenImage, fps: float, field: str
    ) -> None:
        """Read the first frame's header, from which the size of all frames is chosen.

        Raises `InputError` if the first frame is invalid. The size of other frames is checked when
        they are decoded.
        """
        self._sources, self._open, self._field = sources, open_image, field
        # Kept open until it is decoded.
        self._first: MediaReader | None = open_image(sources[0], f"{field}[0]")
        size = self._first.header
        self.header = MediaHeader(size.height, size.width, len(sources), fps)

    def times(self, indices: Sequence[int]) -> list[float]:
        return [index / self.header.fps for index in indices]

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        for index in indices:
            with self._reader(index) as reader:
                pixels = next(iter(reader.frames([0], height, width))).pixels
            yield Frame(index, pixels)

    def _reader(self, index: int) -> MediaReader:
        if index == 0 and self._first is not None:
            reader, self._first = self._first, None
            return reader
        field = f"{self._field}[{index}]"
        reader = self._open(self._sources[index], field)
        size, first = reader.header, self.header
        if not (_is_close(size.height, first.height) and _is_close(size.width, first.width)):
            with reader:
                raise InputError(
                    field,
                    f"{size.width}×{size.height} pixels, but the first frame {first.width}×"
                    f"{first.height}; frames may differ by at most {MAX_DIFFERENCE} pixels or "
                    f"{MAX_SHARE:.0%}: resize them",
                )
        return reader

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._first is not None:
            self._first.__exit__(*exc)


def _is_close(size: int, first: int) -> bool:
    return abs(size - first) <= max(MAX_DIFFERENCE, MAX_SHARE * first)


def pad(indices: Sequence[int], factor: int) -> tuple[int, ...]:
    """Repeat the last index until the length is a multiple of `factor`."""
    return (*indices, *[indices[-1]] * (-len(indices) % factor))
