"""Read video files; only groups of pictures that contain selected frames are decoded."""

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

BROKEN = "the video is corrupt: it cannot be decoded"
MAX_LACKING = 0.1  # share of the header's number of frames that may be missing from the file
RATE_DIFFERS = 0.01  # relative difference allowed between the header's frame rate and that of pts
AS_IT_IS, MIRRORED = slice(None), slice(None, None, -1)


class VideoFile:
    """`MediaReader` of a video file. It closes the file."""

    def __init__(self, file: BinaryIO, limits: MediaLimits, field: str) -> None:
        """Read all packets and decode the first frame.

        Raises `InputError` if the file is corrupt, not supported or exceeds a limit.
        """
        self._file, self._limits, self._field = file, limits, field
        self._reformatter = VideoReformatter()
        try:
            self._index, rate, first = self._read_index()
            self._turn = turn_of(first)
        except InputError:
            raise
        except Exception:  # of any type; its text may reveal memory, so it is not shown
            raise InputError(field, BROKEN) from None
        size = (first.height, first.width)
        if self._turn[0]:
            size = (first.width, first.height)
        self.header = MediaHeader(*size, self._index.num_frames, rate)
        limits.check_duration(self.header.num_frames / rate, field)

    def _read_index(self) -> tuple[VideoIndex, float, Any]:
        """Return (index, average frame rate, first frame)."""
        with open_container(self._file, self._field) as container:
            stream = video_stream(container, self._limits, self._field)
            maker = IndexMaker(self._limits, stream.time_base, self._field)
            packets = maker.passed(packets_of(container, stream))
            stream.codec_context.thread_type = "NONE"  # threads would delay the first frame
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
        """Convert to RGB, resize, then apply orientation; resizing first is less work."""
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
    """Return the header's rate if the pts agree with it, because pts may be rounded to 1 ms."""
    declared = float(stream.average_rate or stream.guessed_rate or 0)
    measured = index.rate() if index.is_exact else 0.0
    if not measured or abs(declared - measured) <= RATE_DIFFERS * measured:
        return declared
    return measured


def rgb_pixels(frame: Any) -> Pixels:
    """Return a view of an rgb24 frame, uint8 [height, width, 3]."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : frame.width * 3].reshape(frame.height, frame.width, 3)


def turn_of(frame: Any) -> tuple[bool, tuple[slice, slice]]:
    """Return how to apply a frame's display matrix: (swap rows and columns, then slices to mirror).

    Phones record sideways and store the rotation as a matrix: x' = ax + cy, y' = bx + dy.
    """
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, (AS_IT_IS, AS_IT_IS)
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(int)
    is_sideways = abs(b) + abs(c) > abs(a) + abs(d)
    x, y = (c, b) if is_sideways else (a, d)
    return is_sideways, (MIRRORED if y < 0 else AS_IT_IS, MIRRORED if x < 0 else AS_IT_IS)
