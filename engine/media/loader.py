"""A request's images and videos: opened and chosen at once, decoded unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..config import PreprocessConfig
from ..input_error import InputError
from .animation import AnimationFile, is_animation
from .frames import LISTED_FPS, FrameList, pad
from .image import ImageFile
from .item import MediaItem, PatchShape, UnitContent, make_item, make_unit
from .limits import MediaLimits
from .options import MediaOptions
from .reader import MediaReader, Pixels
from .room import TokenRoom
from .sizes import FRAME_FACTOR, frame_indices, frame_range, frame_size, image_size, smart_nframes
from .source import BYTES, MediaAccess, open_source
from .video import VideoFile

MOST_LACKING = 0.1  # share of the chosen frames that a file may lack and still count as whole

# Opens an image's or a video's file: ("image" or "video", file, limits, field).
OpenReader = Callable[[str, BinaryIO | Image.Image, MediaLimits, str], MediaReader]


def open_here(
    kind: str, file: BinaryIO | Image.Image, limits: MediaLimits, field: str
) -> MediaReader:
    """A reader in this process. Raises `InputError`."""
    if kind == "image":
        return ImageFile(file, limits, field)
    if isinstance(file, Image.Image):
        raise InputError(field, "is one image; a video is a file or a list of frames")
    return open_video(file, limits, field)


def open_video(file: BinaryIO, limits: MediaLimits, field: str) -> MediaReader:
    """A reader of a video file, or of an animated image. Raises `InputError`."""
    if is_animation(file):
        return AnimationFile(file, limits, field)
    return VideoFile(file, limits, field)


@dataclass(frozen=True, eq=False)
class OpenItem:
    """An item that was chosen and not yet decoded."""

    item: MediaItem
    reader: MediaReader
    field: str


@dataclass(frozen=True)
class MediaLoader:
    preprocess: PreprocessConfig
    shape: PatchShape
    access: MediaAccess
    limits: MediaLimits
    open_reader: OpenReader = open_here

    def open(
        self,
        kind: str,
        source: Any,
        options: MediaOptions,
        room: TokenRoom,
        field: str,
        files: ExitStack,
    ) -> OpenItem:
        """Chooses size and frames. What it opens is closed with `files`. Raises `InputError`."""
        if kind == "image":
            return self._open_image(source, options, room, field, files)
        return self._open_video(source, options, room, field, files)

    def _open_image(
        self, source: Any, options: MediaOptions, room: TokenRoom, field: str, files: ExitStack
    ) -> OpenItem:
        reader = files.enter_context(self._reader("image", source, field))
        header, factor = reader.header, self.shape.factor
        size = image_size(header.height, header.width, options, self.preprocess, factor, field)
        room.take_image(*size, options, field)
        return OpenItem(make_item("image", 1, *size, self.shape), reader, field)

    def _open_video(
        self, source: Any, options: MediaOptions, room: TokenRoom, field: str, files: ExitStack
    ) -> OpenItem:
        if isinstance(source, Sequence) and not isinstance(source, BYTES):
            reader: MediaReader = self._frame_list(source, options, field)
            indices = pad(range(len(source)), FRAME_FACTOR)
            rate = reader.header.fps
        else:
            reader = files.enter_context(self._reader("video", source, field))
            indices, rate = self._choose(reader, options, field)
        header, count = reader.header, len(indices)
        size = frame_size(
            header.height,
            header.width,
            count,
            options,
            self.preprocess,
            room.max_model_len,
            self.shape.factor,
            field,
        )
        room.take_video(*size, count, options, field)
        times = tuple(reader.times(indices))
        item = make_item("video", count, *size, self.shape, indices, times, rate)
        return OpenItem(item, reader, field)

    def _choose(
        self, reader: MediaReader, options: MediaOptions, field: str
    ) -> tuple[tuple[int, ...], float]:
        """The frames that are taken of a file, and how many of them make a second."""
        header = reader.header
        first, last = frame_range(options, header.num_frames, header.fps, field)
        total = last - first + 1
        count = smart_nframes(options, total, header.fps, self.preprocess, self.limits, field)
        return tuple(frame_indices(count, first, last)), count / total * header.fps

    def _frame_list(self, sources: Sequence[Any], options: MediaOptions, field: str) -> FrameList:
        if not sources:
            raise InputError(field, "0 frames; a list has at least one")
        self.limits.check_frames(len(sources), field)
        for name in ("nframes", "min_frames", "max_frames", "video_start", "video_end"):
            if getattr(options, name) is not None:
                raise InputError(
                    field, f"{name} is for video files; frames of a list are taken as they are"
                )

        def open_image(source: Any, field: str) -> MediaReader:
            return self._reader("image", source, field)

        return FrameList(sources, open_image, options.fps or LISTED_FPS, field)

    def _reader(self, kind: str, source: Any, field: str) -> MediaReader:
        file = open_source(source, self.access, self.limits, field)
        try:
            return self.open_reader(kind, file, self.limits, field)
        except BaseException:
            if not isinstance(file, Image.Image):
                file.close()
            raise

    def units(self, opened: Sequence[OpenItem], files: ExitStack) -> Iterator[UnitContent]:
        """All units of the items, in order, decoded as they are asked for; then closes `files`."""
        with files:
            for each in opened:
                yield from self._units(each)

    def _units(self, opened: OpenItem) -> Iterator[UnitContent]:
        info = opened.item.info
        frames = _all_frames(opened)
        size = 1 if info.kind == "image" else self.shape.unit_frames
        for first in range(0, info.num_frames, size):
            count = min(size, info.num_frames - first)
            pixels = np.empty((count, info.height, info.width, 3), np.uint8)
            for index, frame in enumerate(islice(frames, count)):
                pixels[index] = frame
            yield make_unit(info.kind, pixels, self.shape)


def _all_frames(opened: OpenItem) -> Iterator[Pixels]:
    """As many frames as were chosen: the one before again where a list is odd or a file lacks some.

    Raises `InputError` for a file that lacks many.
    """
    info = opened.item.info
    wanted = list(dict.fromkeys(info.frame_indices)) or [0]
    lacking, came, last = 0, 0, None
    for frame in opened.reader.frames(wanted, info.height, info.width):
        place = wanted.index(frame.index, came)
        lacking += place - came
        _check_lacking(lacking, len(wanted), opened)
        for _ in range(came, place):  # the first frame itself, where none is before it
            yield frame.pixels if last is None else last
        last, came = frame.pixels, place + 1
        yield last
    _check_lacking(lacking + len(wanted) - came, len(wanted), opened)
    for _ in range(info.num_frames - came):
        assert last is not None  # or all would be lacking
        yield last


def _check_lacking(lacking: int, count: int, opened: OpenItem) -> None:
    if lacking == count or lacking > count * MOST_LACKING:
        kind = opened.item.info.kind
        text = f"{lacking} or more of the {count} frames wanted of it cannot be decoded"
        raise InputError(opened.field, f"the {kind} is broken: {text}")
