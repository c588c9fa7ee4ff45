"""Index of a video's frames, built from its packets without decoding.

Packets are stored in decoding order; frames are shown in the order of their presentation time
stamps (pts). Decoding of a frame can start at the last keyframe that is not shown after it.
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
MAX_RATE = 240  # maximum average frames per second of a video
WORTH_A_SEEK = 8  # packets; decoding fewer is faster than a seek past them


@dataclass(frozen=True)
class Run:
    """Packets [start, stop) to decode in one pass, for the frames in `wanted`."""

    start: int
    stop: int
    wanted: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """Maps frames to packets. Packets are in decoding order, frames in display order from 0."""

    pts: Places  # of each packet
    keys: Places  # indices of the packets with keyframes
    packets: Places  # packet index of each frame
    time_base: Fraction  # seconds per unit of pts
    is_exact: bool = True  # False: pts are missing or not unique; only the counts are valid

    @property
    def num_frames(self) -> int:
        return len(self.packets)

    @cached_property
    def shown(self) -> Places:
        """The pts of each frame, ascending."""
        return self.pts[self.packets]

    @cached_property
    def _by_pts(self) -> Places:
        return np.argsort(self.pts)

    def frame_of(self, pts: int | None) -> int | None:
        """Return the frame that is shown at `pts`; None if there is no such frame."""
        if pts is None:
            return None
        index = int(np.searchsorted(self.shown, pts))
        return index if index < len(self.shown) and self.shown[index] == pts else None

    def packet_of(self, pts: int | None) -> int | None:
        """Return the packet with that pts, even if its frame is not shown; None if not found."""
        if pts is None:
            return None
        rank = int(np.searchsorted(self.pts, pts, sorter=self._by_pts))
        found = rank < len(self.pts) and self.pts[self._by_pts[rank]] == pts
        return int(self._by_pts[rank]) if found else None

    def seconds(self, index: int) -> float:
        """Return the time of a frame in seconds after the first one."""
        return float(int(self.shown[index] - self.shown[0]) * self.time_base)

    def rate(self) -> float:
        """Return the average frames per second; 0.0 for a single frame."""
        duration = self.seconds(-1)
        return (self.num_frames - 1) / duration if duration > 0 else 0.0

    def runs(self, indices: Sequence[int]) -> list[Run]:
        """Return the runs to decode for ascending frame indices, skipping groups without any."""
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
        """Return the packet index of the keyframe from which a frame is decoded.

        In an open group of pictures, a frame stored after a keyframe may be shown before it and
        depend on the previous group, so the keyframe's pts must not be later than the frame's.
        """
        before = self.keys[: np.searchsorted(self.keys, self.packets[index], side="right")]
        shown_before = np.flatnonzero(self.pts[before[-8:]] <= self.shown[index])
        if len(shown_before):
            return int(before[-8:][shown_before[-1]])
        return 0


@dataclass
class IndexMaker:
    """Builds a `VideoIndex` from a stream's packets, in decoding order.

    `passed` and `make` raise `InputError`.
    """

    limits: MediaLimits
    time_base: Fraction
    field: str

    def __post_init__(self) -> None:
        self._pts, self._keys, self._hidden = array("q"), array("q"), array("q")
        self._is_exact = True

    def passed(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Yield the same packets and record them."""
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
        if packet.is_discard:  # cut off by an edit list: decoded, but not shown
            self._hidden.append(count)
        self._pts.append(packet.pts or 0)

    def make(self) -> VideoIndex:
        """Build the index. Raises `InputError` if there are no frames."""
        pts, keys = np.array(self._pts, np.int64), np.array(self._keys, np.int64)
        is_shown = np.ones(len(pts), bool)
        is_shown[np.array(self._hidden, np.int64)] = False
        if len(keys):  # frames that depend on a keyframe missing from the file cannot be shown
            is_shown[: keys[0]] = False
            is_shown &= pts >= pts[keys[0]]
        is_exact = self._is_exact and len(np.unique(pts)) == len(pts)
        packets = np.flatnonzero(is_shown)
        if is_exact:
            packets = packets[np.argsort(pts[packets])]
        if not len(packets) or not len(keys):
            raise InputError(self.field, "the video has no frames")
        return VideoIndex(pts, keys, packets, self.time_base, is_exact)
