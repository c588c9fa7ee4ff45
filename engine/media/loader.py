"""Open a request's images and videos; choose their size and frames before decoding.

Opening validates an item and fixes its token count; pixels are decoded later, unit by unit.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..config.engine_config import PreprocessConfig
from ..config.media_limits import MediaLimits
from ..errors import InputError
from .decode.arrays import ArrayFile, is_array
from .decode.frames import LISTED_FPS, FrameList, pad
from .decode.reader import MediaReader
from .embeds import MediaEmbeds, check_options, check_values, read_grid, read_values
from .encode_units import OpenItem, decode_units
from .item import PatchShape, UnitContent, make_item
from .options import OF_LISTS, MediaOptions
from .sizes import (
    FRAME_FACTOR,
    VIDEO_SHARE,
    frame_indices,
    frame_range,
    frame_size,
    image_size,
    smart_nframes,
    with_room,
)
from .source import BYTES, MediaAccess, open_source
from .task import MediaTask
from .token_budget import MediaTokenBudget


@dataclass(frozen=True)
class MediaLoader:
    """Opens media items under the engine's settings."""

    preprocess: PreprocessConfig
    shape: PatchShape
    access: MediaAccess
    limits: MediaLimits

    def open(
        self,
        kind: str,
        source: Any,
        options: MediaOptions,
        budget: MediaTokenBudget,
        field: str,
        task: MediaTask,
    ) -> OpenItem:
        """Open an item and choose its size and frames. `task` closes the opened files.

        Raises `InputError` if the item is invalid or exceeds a limit, and its subclass `TooLong`
        if the item exceeds `budget`.
        """
        task.seconds_left(field)
        if isinstance(source, MediaEmbeds):
            return self._open_embeds(kind, source, options, budget, field)
        if kind == "image":
            return self._open_image(source, options, budget, field, task)
        return self._open_video(source, options, budget, field, task)

    def _open_image(
        self,
        source: Any,
        options: MediaOptions,
        budget: MediaTokenBudget,
        field: str,
        task: MediaTask,
    ) -> OpenItem:
        reader = task.files.enter_context(self._reader("image", source, field, task))
        header, factor = reader.header, self.shape.factor
        size = image_size(header.height, header.width, options, self.preprocess, factor, field)
        budget.take_image(*size, options, field)
        return OpenItem(make_item("image", 1, *size, self.shape), reader, field)

    def _open_video(
        self,
        source: Any,
        options: MediaOptions,
        budget: MediaTokenBudget,
        field: str,
        task: MediaTask,
    ) -> OpenItem:
        if is_array(source) or (isinstance(source, Sequence) and not isinstance(source, BYTES)):
            reader = task.files.enter_context(self._listed(source, options, field, task))
            indices = pad(range(reader.header.num_frames), FRAME_FACTOR)
            rate = reader.header.fps
        else:
            reader = task.files.enter_context(self._reader("video", source, field, task))
            indices, rate = self._choose(reader, options, budget, field)
        header, count = reader.header, len(indices)
        size = frame_size(
            header.height,
            header.width,
            count,
            options,
            self.preprocess,
            budget.max_model_len,
            self.shape.factor,
            field,
        )
        budget.take_video(*size, count, options, field)
        times = tuple(reader.times(indices))
        raw = options.raw_fps
        item = make_item("video", count, *size, self.shape, indices, times, rate, raw)
        return OpenItem(item, reader, field)

    def _open_embeds(
        self,
        kind: str,
        source: MediaEmbeds,
        options: MediaOptions,
        budget: MediaTokenBudget,
        field: str,
    ) -> OpenItem:
        # Values are copied now, not on demand, so that invalid ones are reported at once.
        shape, patch = self.shape, self.shape.patch_size
        check_options(options, field)
        grid = read_grid(source, kind, shape, self.limits, field)
        check_values(source, grid, shape, self.limits, field)
        count = 1 if kind == "image" else grid[0] * shape.temporal_patch_size
        item = make_item(kind, count, grid[1] * patch, grid[2] * patch, shape)
        budget.take_embeds(item.num_tokens, field)
        return OpenItem(item, read_values(source, field), field)

    def _choose(
        self, reader: MediaReader, options: MediaOptions, budget: MediaTokenBudget, field: str
    ) -> tuple[tuple[int, ...], float]:
        """Return the indices of the frames to decode from a file, and their frames per second.

        A single frame is repeated.
        """
        for name in OF_LISTS:
            if getattr(options, name) is not None:
                text = "applies only to lists of frames; for a video file, pass fps"
                raise InputError(f"{field}.{name}", text)
        header = reader.header
        first, last = frame_range(options, header.num_frames, header.fps, field)
        total = last - first + 1
        if total == 1 and (options.nframes or 1) <= FRAME_FACTOR:
            return pad([first], FRAME_FACTOR), header.fps
        most = int(VIDEO_SHARE * budget.share) * self.shape.factor**2
        preprocess = with_room(self.preprocess, options, most)
        count = smart_nframes(options, total, header.fps, preprocess, self.limits, field)
        return tuple(frame_indices(count, first, last)), count / total * header.fps

    def _listed(
        self, sources: Any, options: MediaOptions, field: str, task: MediaTask
    ) -> MediaReader:
        """Return a reader of a video that is given as a list of images or as an array."""
        for name in ("nframes", "min_frames", "max_frames", "video_start", "video_end"):
            if getattr(options, name) is not None:
                raise InputError(
                    field, f"{name} applies only to video files; all frames of a list are used"
                )
        fps = options.sample_fps or options.fps or LISTED_FPS
        if is_array(sources):
            return ArrayFile(sources, "video", self.limits, field, fps)
        if not sources:
            raise InputError(field, "0 frames; pass a list of at least one")
        self.limits.check_frames(len(sources), field)

        def open_image(source: Any, field: str) -> MediaReader:
            return self._reader("frame", source, field, task)

        return FrameList(sources, open_image, fps, field)

    def _reader(self, kind: str, source: Any, field: str, task: MediaTask) -> MediaReader:
        if is_array(source):
            return ArrayFile(source, kind, self.limits, field)
        file = open_source(source, self.access, field, task)
        try:
            return task.open_reader(kind, file, self.limits, field)
        except BaseException:
            if not isinstance(file, Image.Image):
                file.close()
            raise

    def units(
        self, opened: Sequence[OpenItem], task: MediaTask
    ) -> Generator[UnitContent, None, None]:
        """Decode opened items; see `decode_units`."""
        return decode_units(opened, self.shape, task)
