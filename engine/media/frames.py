"""A video given as a list of frames, each any image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

from ..input_error import InputError
from .reader import Frame, MediaHeader, MediaReader
from .resample import resize_frame

LISTED_FPS = 2.0  # where the caller says nothing


class OpenImage(Protocol):
    def __call__(self, source: Any, field: str) -> MediaReader: ...


class FrameList:
    """The listed frames, as a `MediaReader`; each is opened when its turn comes."""

    def __init__(
        self, sources: Sequence[Any], open_image: OpenImage, fps: float, field: str
    ) -> None:
        """Reads the first frame's header: all must be of its size. Raises `InputError`."""
        self._sources, self._open, self._field = sources, open_image, field
        with open_image(sources[0], f"{field}[0]") as first:
            size = first.header
        self.header = MediaHeader(size.height, size.width, len(sources), fps)

    def times(self, indices: Sequence[int]) -> list[float]:
        return [index / self.header.fps for index in indices]

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        first = self.header
        for index in indices:
            field = f"{self._field}[{index}]"
            with self._open(self._sources[index], field) as reader:
                size = reader.header
                if (size.height, size.width) != (first.height, first.width):
                    raise InputError(
                        field,
                        f"{size.width}×{size.height} pixels, the first frame {first.width}×"
                        f"{first.height}; all must be of one size",
                    )
                frame = next(iter(reader.frames([0], size.height, size.width)))
            yield Frame(index, resize_frame(frame.pixels, height, width))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def pad(indices: Sequence[int], factor: int) -> tuple[int, ...]:
    """The indices with the last one repeated, up to a multiple of `factor`."""
    return (*indices, *[indices[-1]] * (-len(indices) % factor))
