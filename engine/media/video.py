"""Video files: decoded as a stream, so that only the frames that were chosen are held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Self

import av
import numpy as np
from PIL import Image

from ..input_error import InputError
from .limits import MediaLimits
from .reader import Frame, MediaHeader, Pixels

BROKEN = "the video is broken: it cannot be decoded"


class VideoFile:
    """A video file, as a `MediaReader`. It closes the file."""

    def __init__(self, file: BinaryIO, limits: MediaLimits, field: str) -> None:
        """Reads the header and counts the frames, without decoding. Raises `InputError`."""
        self._file, self._limits, self._field = file, limits, field
        try:
            self.header = self._read_header()
        except InputError:
            raise
        except Exception:  # decoders raise all kinds; their texts may tell of memory
            raise InputError(field, BROKEN) from None

    def _read_header(self) -> MediaHeader:
        with _open(self._file, self._field) as container:
            if not container.streams.video:
                raise InputError(self._field, "the file has no video")
            stream = container.streams.video[0]
            self._limits.check_size(stream.width, stream.height, self._field)
            total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            rate = stream.average_rate or stream.guessed_rate
            size = (stream.height, stream.width)
        if not total or not rate:
            text = "the video has no frames, or does not say how many a second"
            raise InputError(self._field, text)
        self._limits.check_duration(total / float(rate), self._field)
        return MediaHeader(*size, total, float(rate))

    def times(self, indices: Sequence[int]) -> list[float]:
        return [index / self.header.fps for index in indices]

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        try:
            yield from self._decode(indices, height, width)
        except InputError:
            raise
        except Exception:
            raise InputError(self._field, BROKEN) from None

    def _decode(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        wanted = iter(indices)
        next_index = next(wanted, None)
        with _open(self._file, self._field) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                self._limits.check_size(frame.width, frame.height, self._field)
                if index == next_index:
                    yield Frame(index, resize_frame(frame.to_image(), height, width))
                    next_index = next(wanted, None)
                    if next_index is None:
                        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _open(file: BinaryIO, field: str) -> Any:
    """The container, of a format that is allowed, named so that nothing else is probed."""
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    form = None
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        form = "mov"
    elif head[:4] == b"\x1aE\xdf\xa3":
        form = "matroska"
    elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        form = "avi"
    if form is None:
        raise InputError(field, "not a video that is read (mp4, mov, mkv, webm, avi)")
    return av.open(file, format=form)


def resize_frame(image: Image.Image, height: int, width: int) -> Pixels:
    """uint8 [height, width, 3], bicubic in float with one rounding at the end.

    So torchvision resizes frames for transformers; PIL's own RGB resize rounds and clips twice,
    which differs by up to 16 levels at hard edges.
    """
    pixels = np.asarray(image)
    if image.size == (width, height):
        return pixels
    size, cubic = (width, height), Image.Resampling.BICUBIC
    colors = (Image.fromarray(pixels[..., i].astype(np.float32)) for i in range(3))
    resized = np.stack([np.asarray(color.resize(size, cubic)) for color in colors], axis=-1)
    return resized.round().clip(0, 255).astype(np.uint8)
