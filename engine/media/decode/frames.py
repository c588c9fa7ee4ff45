"""A video given as a list of frames, each any image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

from ...errors import InputError
from .reader import Frame, MediaHeader, MediaReader

MAX_DIFFERENCE, MAX_SHARE = 8, 0.05  # pixels, or share, by which a side may differ from the first's
LISTED_FPS = 2.0  # where the caller says nothing


class OpenImage(Protocol):
    def __call__(self, source: Any, field: str) -> MediaReader: ...


class FrameList:
    """The listed frames, as a `MediaReader`; each is opened when its turn comes."""

    def __init__(
        self, sources: Sequence[Any], open_image: OpenImage, fps: float, field: str
    ) -> None:
        """Reads the first frame's header: all are resized to the size that is chosen for it, so
        they may differ by little. Raises `InputError`."""
        self._sources, self._open, self._field = sources, open_image, field
        self._first: MediaReader | None = open_image(sources[0], f"{field}[0]")  # until its turn
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
                    f"{size.width}×{size.height} pixels, the first frame {first.width}×"
                    f"{first.height}; frames must be of one size, or within {MAX_DIFFERENCE} "
                    f"pixels or {MAX_SHARE:.0%} of it: resize them",
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
    """The indices with the last one repeated, up to a multiple of `factor`."""
    return (*indices, *[indices[-1]] * (-len(indices) % factor))
