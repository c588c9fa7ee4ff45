"""Decodes items that were chosen: encode units, one after another."""

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
    """Units that come from `source`; `run` or `finish` goes through it, once."""

    def __init__(self, source: Generator[UnitContent, None, None]) -> None:
        self._source = source
        self._ready: deque[UnitContent] = deque()
        self._is_cancelled = False
        self.is_done = False  # no more units come than `take` gives
        self.error: InputError | None = None  # set before the stream is done
        self.on_arrival: Callable[[], None] = lambda: None  # called by the thread that makes them

    def finish(self) -> tuple[UnitContent, ...]:
        """Makes all that are left and gives them, in the caller's thread. Raises `InputError`."""
        return tuple(self._source)

    def run(self) -> None:
        """Makes all that are left, in the caller's thread. An error is kept for who takes them."""
        try:
            while not self._is_cancelled and (unit := next(self._source, None)) is not None:
                self._ready.append(unit)
                self.on_arrival()
        except InputError as error:
            self.error = error
        except Exception:  # a fault of ours: the request's alone all the same
            log.exception("a video's frames could not be made ready")
            self.error = InputError("prompt", "its video could not be made ready")
        finally:
            self._source.close()  # and with it the files
            self.is_done = True
            self.on_arrival()

    def take(self) -> list[UnitContent]:
        """What has come since the last call."""
        return [self._ready.popleft() for _ in range(len(self._ready))]

    def cancel(self) -> None:
        """Nobody wants the rest: `run` stops after the unit in hand."""
        self._is_cancelled = True


MAX_LACKING = 0.1  # share of the chosen frames that a file may lack and still count as whole


@dataclass(frozen=True, eq=False)
class OpenItem:
    """An item that was chosen and not yet decoded."""

    item: MediaItem
    reader: MediaReader | Embeds  # what its units are made of
    field: str


def decode_units(
    opened: Sequence[OpenItem], shape: PatchShape, task: MediaTask
) -> Generator[UnitContent, None, None]:
    """All units of the items, in order, decoded as they are asked for; then closes `task`.

    Raises `InputError`.
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
    """Cut as pixels are: frame by frame, so many temporal patches each."""
    depth, height, width = info.grid_thw
    tokens, size = len(embeds) // depth, shape.max_unit_temporal_patches
    for first in range(0, depth, size):
        last = min(first + size, depth)
        part = embeds[first * tokens : last * tokens]
        yield make_embeds_unit(info.kind, part, (last - first, height, width))


def _all_frames(opened: OpenItem, reader: MediaReader, task: MediaTask) -> Iterator[Pixels]:
    """As many frames as were chosen, of which some may be the same. For one that the file lacks
    the one before it comes again. Raises `InputError` for a file that lacks many."""
    info = opened.item.info
    repeats = Counter(info.frame_indices or (0,))
    wanted = list(repeats)
    lacking, came, last = 0, 0, None
    for frame in reader.frames(wanted, info.height, info.width):
        task.seconds_left(opened.field)
        place = wanted.index(frame.index, came)
        lacking += place - came
        _check_lacking(lacking, len(wanted), opened)
        last = frame.pixels if last is None else last
        for index in wanted[came:place]:
            yield from repeat(last, repeats[index])
        last, came = frame.pixels, place + 1
        yield from repeat(last, repeats[frame.index])
    _check_lacking(lacking + len(wanted) - came, len(wanted), opened)
    for index in wanted[came:]:
        yield from repeat(last, repeats[index])


def _check_lacking(lacking: int, count: int, opened: OpenItem) -> None:
    if lacking == count or lacking > count * MAX_LACKING:
        kind = opened.item.info.kind
        text = f"{lacking} or more of the {count} frames wanted of it cannot be decoded"
        raise InputError(opened.field, f"the {kind} is broken: {text}")
