"""Where a video's frames are, from its packets alone: nothing is decoded.

Packets stand in the file in decoding order, frames are shown in the order of their time stamps
(pts). A frame can be decoded from the last keyframe that is shown no later than it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ...config.media_limits import MediaLimits
from ...errors import InputError

Places = npt.NDArray[np.int64]
MAX_RATE = 240  # frames a second that are believed of a whole video
WORTH_A_SEEK = 8  # packets: to decode fewer than these is quicker than to start anew behind them


@dataclass(frozen=True)
class Run:
    """Packets [start, stop), which are decoded in one go for the frames wanted of them."""

    start: int
    stop: int
    wanted: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """Of the packets in decoding order; frames count from 0 in the order they are shown in."""

    pts: Places  # of each packet
    keys: Places  # the packets of keyframes
    packets: Places  # of each frame: its packet
    time_base: Fraction  # seconds of a pts
    is_exact: bool = True  # False: time stamps are lacking or not one a frame; nothing but counts

    @property
    def num_frames(self) -> int:
        return len(self.packets)

    @cached_property
    def shown(self) -> Places:
        """The pts of each frame, rising."""
        return self.pts[self.packets]

    @cached_property
    def _by_pts(self) -> Places:
        return np.argsort(self.pts)

    def frame_of(self, pts: int | None) -> int | None:
        """The frame that is shown at `pts`."""
        if pts is None:
            return None
        index = int(np.searchsorted(self.shown, pts))
        return index if index < len(self.shown) and self.shown[index] == pts else None

    def packet_of(self, pts: int | None) -> int | None:
        """The packet of that time stamp, whether its frame is shown or not."""
        if pts is None:
            return None
        place = int(np.searchsorted(self.pts, pts, sorter=self._by_pts))
        found = place < len(self.pts) and self.pts[self._by_pts[place]] == pts
        return int(self._by_pts[place]) if found else None

    def seconds(self, index: int) -> float:
        """When a frame is shown, from the first one on."""
        return float(int(self.shown[index] - self.shown[0]) * self.time_base)

    def rate(self) -> float:
        """Frames a second, on average; 0.0 of one frame."""
        lasts = self.seconds(-1)
        return (self.num_frames - 1) / lasts if lasts > 0 else 0.0

    def runs(self, indices: Sequence[int]) -> list[Run]:
        """What must be decoded for those frames, which rise: groups that hold none are left out."""
        runs: list[Run] = []
        for index in indices:
            start, stop = self._start(index), int(self.packets[index]) + 1
            if runs and start < runs[-1].stop + WORTH_A_SEEK:
                last = runs.pop()
                runs.append(Run(last.start, max(last.stop, stop), (*last.wanted, index)))
            else:
                runs.append(Run(start, stop, (index,)))
        return runs

    def _start(self, index: int) -> int:
        """The keyframe from which a frame is decoded.

        Frames between a keyframe and its packet may be shown before that keyframe and need the
        group before it (an open group of pictures): so its time counts, not its place alone.
        """
        before = self.keys[: np.searchsorted(self.keys, self.packets[index], side="right")]
        shown_before = np.flatnonzero(self.pts[before[-8:]] <= self.shown[index])
        if len(shown_before):
            return int(before[-8:][shown_before[-1]])
        return 0


@dataclass
class IndexMaker:
    """Takes a stream's packets, in decoding order. `passed` and `make` raise `InputError`."""

    limits: MediaLimits
    time_base: Fraction
    field: str

    def __post_init__(self) -> None:
        self._pts, self._keys, self._hidden = array("q"), array("q"), array("q")
        self._is_exact = True

    def passed(self, packets: Iterator[Any]) -> Iterator[Any]:
        """The same packets, taken as they go by."""
        for packet in packets:
            self._add(packet)
            yield packet

    def _add(self, packet: Any) -> None:
        count = len(self._pts)
        if count >= self.limits.max_video_seconds * MAX_RATE:
            self.limits.refuse("max_video_seconds", self.field, f"a video of over {count} frames")
        if packet.pts is None:
            self._is_exact = False
        if packet.is_keyframe:
            self._keys.append(count)
        if packet.is_discard:  # before the cut of an edit list: decoded, never shown
            self._hidden.append(count)
        self._pts.append(packet.pts or 0)

    def make(self) -> VideoIndex:
        pts, keys = np.array(self._pts, np.int64), np.array(self._keys, np.int64)
        is_shown = np.ones(len(pts), bool)
        is_shown[np.array(self._hidden, np.int64)] = False
        if len(keys):  # what needs a keyframe that is not in the file is never shown
            is_shown[: keys[0]] = False
            is_shown &= pts >= pts[keys[0]]
        is_exact = self._is_exact and len(np.unique(pts)) == len(pts)
        packets = np.flatnonzero(is_shown)
        if is_exact:
            packets = packets[np.argsort(pts[packets])]
        if not len(packets) or not len(keys):
            raise InputError(self.field, "the video has no frames")
        return VideoIndex(pts, keys, packets, self.time_base, is_exact)
