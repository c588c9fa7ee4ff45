"""Decode opened media items into encode units, as a stream."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

import numpy as np

from ..errors import InputError
from .decode.reader import MediaReader, Pixels
from .item import (
    Embeds,
    MediaInfo,
    MediaItem,
    PatchShape,
    UnitContent,
    make_embeds_unit,
    make_unit,
)
from .task import MediaTask

log = logging.getLogger("octavo.engine")


class UnitStream:
    """Stream of the units that `source` yields.

    Call either `run` (in a worker thread, with `take` in another) or `finish`, once.
    """

    def __init__(self, source: Generator[UnitContent, None, None]) -> None:
        self._source = source
        self._ready: deque[UnitContent] = deque()
        self._is_cancelled = False
        self.is_done = False  # `run` has ended; only the units not yet taken remain
        self.error: InputError | None = None  # set before `is_done`
        self.on_arrival: Callable[[], None] = lambda: None  # called in the thread of `run`

    def finish(self) -> tuple[UnitContent, ...]:
        """Return all units, decoded in the caller's thread. Raises `InputError`."""
        return tuple(self._source)

    def run(self) -> None:
        """Decode all units in the caller's thread; store an error in `error`."""
        try:
            while not self._is_cancelled and (unit := next(self._source, None)) is not None:
                self._ready.append(unit)
                self.on_arrival()
        except InputError as error:
            self.error = error
        except Exception:  # an internal error, which must fail only this request
            log.exception("preprocessing a video's frames failed")
            self.error = InputError("prompt", "its video could not be preprocessed")
        finally:
            self._source.close()  # also closes the files
            self.is_done = True
            self.on_arrival()

    def take(self) -> list[UnitContent]:
        """Return the units decoded since the last call."""
        return [self._ready.popleft() for _ in range(len(self._ready))]

    def cancel(self) -> None:
        """Make `run` stop after the current unit."""
        self._is_cancelled = True


MAX_LACKING = 0.1  # share of the chosen frames that may be missing from a file


@dataclass(frozen=True, eq=False)
class OpenItem:
    """An item whose size and frames are chosen, and that is not decoded yet."""

    item: MediaItem
    reader: MediaReader | Embeds  # source of its units
    field: str


def decode_units(
    opened: Sequence[OpenItem], shape: PatchShape, task: MediaTask
) -> Generator[UnitContent, None, None]:
    """Yield all units of the items, in order and decoded on demand, then close `task`.

    Raises `InputError` if an item cannot be decoded or the task's time is up.
    """
    try:
        for each in opened:
            if isinstance(each.reader, np.ndarray):
                yield from _cut_embeds(each.item.info, each.reader, shape)
            else:
                yield from _decode(each, each.reader, shape, task)
    finally:
        task.close()


def _decode(
    opened: OpenItem, reader: MediaReader, shape: PatchShape, task: MediaTask
) -> Iterator[UnitContent]:
    info = opened.item.info
    frames = _all_frames(opened, reader, task)
    if info.kind == "image":
        yield make_unit(info.kind, next(frames)[None], shape)
        return
    for first in range(0, info.num_frames, shape.unit_frames):
        count = min(shape.unit_frames, info.num_frames - first)
        pixels = np.empty((count, info.height, info.width, 3), np.uint8)
        for index, frame in enumerate(islice(frames, count)):
            pixels[index] = frame
        yield make_unit(info.kind, pixels, shape)


def _cut_embeds(info: MediaInfo, embeds: Embeds, shape: PatchShape) -> Iterator[UnitContent]:
    """Yield units of at most `max_unit_temporal_patches` temporal patches, as for pixels."""
    depth, height, width = info.grid_thw
    tokens, size = len(embeds) // depth, shape.max_unit_temporal_patches
    for first in range(0, depth, size):
        last = min(first + size, depth)
        part = embeds[first * tokens : last * tokens]
        yield make_embeds_unit(info.kind, part, (last - first, height, width))


def _all_frames(opened: OpenItem, reader: MediaReader, task: MediaTask) -> Iterator[Pixels]:
    """Yield one frame for each chosen index; indices may repeat.

    A frame that is missing from the file is replaced by the previous one (by the next one at the
    start). Raises `InputError` if too many frames are missing.
    """
    info = opened.item.info
    repeats = Counter(info.frame_indices or (0,))
    wanted = list(repeats)
    lacking, num_done, last = 0, 0, None
    for frame in reader.frames(wanted, info.height, info.width):
        task.seconds_left(opened.field)
        position = wanted.index(frame.index, num_done)
        lacking += position - num_done
        _check_lacking(lacking, len(wanted), opened)
        last = frame.pixels if last is None else last
        for index in wanted[num_done:position]:
            yield from repeat(last, repeats[index])
        last, num_done = frame.pixels, position + 1
        yield from repeat(last, repeats[frame.index])
    _check_lacking(lacking + len(wanted) - num_done, len(wanted), opened)
    for index in wanted[num_done:]:
        yield from repeat(last, repeats[index])


def _check_lacking(lacking: int, count: int, opened: OpenItem) -> None:
    if lacking == count or lacking > count * MAX_LACKING:
        kind = opened.item.info.kind
        text = f"at least {lacking} of the {count} selected frames cannot be decoded"
        raise InputError(opened.field, f"the {kind} is corrupt: {text}")
