"""Video files: only the groups of pictures that hold chosen frames are decoded, as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Self

import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter

from ...config.media_limits import MediaLimits
from ...errors import InputError
from .reader import Frame, MediaHeader, Pixels
from .resample import resize_frame
from .video_decode import chosen_frames, frames_of, packets_of
from .video_index import IndexMaker, VideoIndex
from .video_open import open_container, video_stream

BROKEN = "the video is broken: it cannot be decoded"
MAX_LACKING = 0.1  # share of the frames a header speaks of that the file may lack
RATE_DIFFERS = 0.01  # share by which a header's frame rate may differ from the time stamps
AS_IT_IS, MIRRORED = slice(None), slice(None, None, -1)


class VideoFile:
    """A video file, as a `MediaReader`. It closes the file."""

    def __init__(self, file: BinaryIO, limits: MediaLimits, field: str) -> None:
        """Reads all packets and decodes the first frame. Raises `InputError`."""
        self._file, self._limits, self._field = file, limits, field
        self._reformatter = VideoReformatter()
        try:
            self._index, rate, first = self._read_index()
            self._turn = turn_of(first)
        except InputError:
            raise
        except Exception:  # decoders raise all kinds; their texts may tell of memory
            raise InputError(field, BROKEN) from None
        size = (first.height, first.width)
        if self._turn[0]:
            size = (first.width, first.height)
        self.header = MediaHeader(*size, self._index.num_frames, rate)
        limits.check_duration(self.header.num_frames / rate, field)

    def _read_index(self) -> tuple[VideoIndex, float, Any]:
        """The index, the average frame rate, and the first frame."""
        with open_container(self._file, self._field) as container:
            stream = video_stream(container, self._limits, self._field)
            maker = IndexMaker(self._limits, stream.time_base, self._field)
            packets = maker.passed(packets_of(container, stream))
            stream.codec_context.thread_type = "NONE"  # so that the first frame comes at once
            first = next(frames_of(stream.codec_context, packets), None)
            for _ in packets:
                pass
            index = maker.make()
            rate = _frame_rate(index, stream) or float(index.num_frames == 1)
            lacking = stream.frames - len(index.pts)
        if first is None or not rate or lacking > stream.frames * MAX_LACKING:
            raise InputError(self._field, BROKEN)
        self._limits.check_size(first.width, first.height, self._field)
        return index, rate, first

    def times(self, indices: Sequence[int]) -> list[float]:
        if not self._index.is_exact:
            return [index / self.header.fps for index in indices]
        return [self._index.seconds(index) for index in indices]

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        try:
            chosen = chosen_frames(self._file, self._index, indices, self._limits, self._field)
            for index, frame in chosen:
                self._limits.check_size(frame.width, frame.height, self._field)
                yield Frame(index, self._upright(frame, height, width))
        except InputError:
            raise
        except Exception:
            raise InputError(self._field, BROKEN) from None

    def _upright(self, frame: Any, height: int, width: int) -> Pixels:
        """RGB, resized and then turned, which is less work than the other way round."""
        is_sideways, flips = self._turn
        pixels = rgb_pixels(self._reformatter.reformat(frame, format="rgb24"))
        if is_sideways:
            return resize_frame(pixels, width, height).swapaxes(0, 1)[flips]
        return resize_frame(pixels, height, width)[flips]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _frame_rate(index: VideoIndex, stream: Any) -> float:
    """The header's, where time stamps agree: they may be rounded to milliseconds."""
    said = float(stream.average_rate or stream.guessed_rate or 0)
    found = index.rate() if index.is_exact else 0.0
    if not found or abs(said - found) <= RATE_DIFFERS * found:
        return said
    return found


def rgb_pixels(frame: Any) -> Pixels:
    """A view of an rgb24 frame, uint8 [height, width, 3]."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : frame.width * 3].reshape(frame.height, frame.width, 3)


def turn_of(frame: Any) -> tuple[bool, tuple[slice, slice]]:
    """How a frame is made upright: whether rows and columns change places, then what is mirrored.

    A phone held upright films sideways and says so by a matrix: x' = ax + cy, y' = bx + dy.
    """
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, (AS_IT_IS, AS_IT_IS)
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(int)
    is_sideways = abs(b) + abs(c) > abs(a) + abs(d)
    x, y = (c, b) if is_sideways else (a, d)
    return is_sideways, (MIRRORED if y < 0 else AS_IT_IS, MIRRORED if x < 0 else AS_IT_IS)
