"""Videos: which frames, at what size, decoded as a stream so that only kept frames are held.

Rules: `smart_nframes` and `fetch_video` of qwen-vl-utils.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from PIL import Image

from ..config import PreprocessConfig
from .errors import InputError
from .image import exact_size, load_image, smart_resize
from .media import (
    MAX_LISTED_FRAMES,
    MediaOptions,
    Pixels,
    check_decoded_size,
    read_source,
)
from .room import TokenRoom

FRAME_FACTOR = 2
MAX_FRAMES = 1 << 16  # of one video; a token for every two is over any model's length
BYTES = str | bytes | bytearray | memoryview
MOST_LACKING = 0.1  # share of the stated frames that a file may lack and still count as whole
LISTED_FPS = 2.0  # of frames given as a list, where the caller says nothing


@dataclass(frozen=True)
class Clip:
    """A resized video: frames [n, height, width, 3], their indices in the file, their rate."""

    pixels: Pixels
    frame_indices: tuple[int, ...]
    sample_fps: float


def smart_nframes(
    options: MediaOptions,
    total_frames: int,
    video_fps: float,
    preprocess: PreprocessConfig,
    field: str,
) -> int:
    """How many frames are taken: even, at most `total_frames`. Raises `InputError`."""
    if options.nframes is not None:
        count = round(options.nframes / FRAME_FACTOR) * FRAME_FACTOR
    else:
        low = options.min_frames or preprocess.min_frames
        high = options.max_frames or min(preprocess.max_frames, total_frames)
        low, high = math.ceil(low / FRAME_FACTOR), math.floor(high / FRAME_FACTOR)
        wanted = total_frames / video_fps * (options.fps or preprocess.fps)
        bounded = min(max(wanted, low * FRAME_FACTOR), high * FRAME_FACTOR, total_frames)
        count = math.floor(bounded / FRAME_FACTOR) * FRAME_FACTOR
    if not FRAME_FACTOR <= count <= min(total_frames, MAX_FRAMES):
        raise InputError(
            field,
            f"{count} frames asked of a video of {total_frames}; must be {FRAME_FACTOR} to "
            f"{min(total_frames, MAX_FRAMES)}: change nframes, fps, min_frames or max_frames",
        )
    return count


def frame_indices(count: int, total_frames: int) -> list[int]:
    """`count` frames evenly from first to last, rounded as torch.linspace rounds: to float32."""
    last = float(total_frames - 1)
    step = float(np.float32(last) / np.float32(count - 1))
    rising = np.arange(count, dtype=np.float64) * step
    half = np.arange(count) < count // 2
    places = np.where(half, rising, last - rising[::-1]).astype(np.float32)
    return places.round().astype(int).tolist()


def frame_size(
    height: int,
    width: int,
    num_frames: int,
    options: MediaOptions,
    preprocess: PreprocessConfig,
    max_model_len: int,
    factor: int,
    field: str,
) -> tuple[int, int]:
    """The size that every frame is resized to."""
    if options.resized_height and options.resized_width:
        return exact_size(options.resized_height, options.resized_width, factor, field)
    low = options.min_pixels or preprocess.video_min_pixels
    total = options.total_pixels or 0.9 * max_model_len * factor**2
    high: float = max(
        min(preprocess.video_max_pixels, total / num_frames * FRAME_FACTOR), int(low * 1.05)
    )
    if options.max_pixels is not None:
        high = min(high, options.max_pixels)
        low = min(low, options.max_pixels)
    return smart_resize(height, width, factor, low, int(high), field)


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


def load_video(
    source: Any,
    options: MediaOptions,
    preprocess: PreprocessConfig,
    room: TokenRoom,
    field: str,
    allow_local_files: bool,
) -> Clip:
    """A video file, or a list of frames. Raises `InputError`."""

    def goal(height: int, width: int, count: int) -> tuple[int, int]:
        size = frame_size(
            height, width, count, options, preprocess, room.max_model_len, room.factor, field
        )
        room.take_video(*size, count, options, field)
        return size

    if isinstance(source, Sequence) and not isinstance(source, BYTES):
        return _load_frames(source, options, goal, field, allow_local_files)
    data = read_source(source, field, allow_local_files)
    if isinstance(data, Image.Image):
        raise InputError(field, "is one image; a video is a file or a list of frames")
    return _decode(data, options, preprocess, goal, field)


def _load_frames(
    sources: Sequence[Any], options: MediaOptions, goal: Any, field: str, allow_local_files: bool
) -> Clip:
    if not 0 < len(sources) <= MAX_LISTED_FRAMES:
        raise InputError(field, f"{len(sources)} frames; must be 1 to {MAX_LISTED_FRAMES}")
    for name in ("nframes", "min_frames", "max_frames"):
        if getattr(options, name) is not None:
            raise InputError(
                field, f"{name} is for video files; frames of a list are taken as they are"
            )
    count = math.ceil(len(sources) / FRAME_FACTOR) * FRAME_FACTOR
    first = load_image(sources[0], f"{field}[0]", allow_local_files)
    height, width = goal(first.height, first.width, count)
    pixels = np.empty((count, height, width, 3), np.uint8)
    for index, source in enumerate(sources):
        image = first if index == 0 else load_image(source, f"{field}[{index}]", allow_local_files)
        if image.size != first.size:
            sizes = [f"{one.width}×{one.height}" for one in (image, first)]
            text = f"{sizes[0]} pixels, the first frame {sizes[1]}; all must be of one size"
            raise InputError(f"{field}[{index}]", text)
        pixels[index] = resize_frame(image, height, width)
    pixels[len(sources) :] = pixels[len(sources) - 1]
    indices = tuple(min(i, len(sources) - 1) for i in range(count))
    return Clip(pixels, indices, options.fps or LISTED_FPS)


def _decode(
    data: bytes, options: MediaOptions, preprocess: PreprocessConfig, goal: Any, field: str
) -> Clip:
    """Counts the file's frames, chooses, and decodes; again if it has a few fewer than it says."""
    try:
        stated, fps = _count_frames(data, field)
        total = stated
        while True:
            count = smart_nframes(options, total, fps, preprocess, field)
            wanted = frame_indices(count, total)
            pixels, kept, seen = _keep_frames(data, wanted, goal, field)
            if kept == count:
                return Clip(pixels, tuple(wanted), count / total * fps)
            if total < stated or seen < stated * (1 - MOST_LACKING):
                break
            total, goal = seen, _same_size(pixels)
    except InputError:
        raise
    except Exception:  # decoders raise all kinds; their texts may tell of memory
        raise InputError(field, "the video is broken: it cannot be decoded") from None
    raise InputError(field, f"the video is broken: {seen} of its {stated} frames can be decoded")


def _same_size(pixels: Pixels) -> Any:
    """For a second pass over the file: the room for its size is taken already."""
    return lambda height, width, count: pixels.shape[1:3]


def _open(data: bytes, field: str) -> Any:
    """The container, of a format that is allowed, named so that nothing else is probed."""
    form = None
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        form = "mov"
    elif data[:4] == b"\x1aE\xdf\xa3":
        form = "matroska"
    elif data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        form = "avi"
    if form is None:
        raise InputError(field, "not a video that is read (mp4, mov, mkv, webm, avi)")
    return av.open(io.BytesIO(data), format=form)


def _count_frames(data: bytes, field: str) -> tuple[int, float]:
    """Number of frames and frames a second, without decoding."""
    with _open(data, field) as file:
        if not file.streams.video:
            raise InputError(field, "the file has no video")
        stream = file.streams.video[0]
        check_decoded_size(stream.width, stream.height, field)
        total = stream.frames or sum(packet.size > 0 for packet in file.demux(stream))
        rate = stream.average_rate or stream.guessed_rate
    if not total or not rate:
        raise InputError(field, "the video has no frames, or does not say how many a second")
    return total, float(rate)


def _keep_frames(data: bytes, wanted: list[int], goal: Any, field: str) -> tuple[Pixels, int, int]:
    """The wanted frames, resized as they come; how many came, and how many were decoded."""
    pixels = np.empty((0, 0, 0, 3), np.uint8)
    kept = seen = 0
    for index, image in _frames(data, field):
        seen = index + 1
        while kept < len(wanted) and wanted[kept] == index:
            if kept == 0:
                height, width = goal(image.height, image.width, len(wanted))
                pixels = np.empty((len(wanted), height, width, 3), np.uint8)
            pixels[kept] = resize_frame(image.to_image(), height, width)
            kept += 1
        if kept == len(wanted):
            break
    return pixels, kept, seen


def _frames(data: bytes, field: str) -> Iterator[tuple[int, Any]]:
    with _open(data, field) as file:
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(file.decode(stream)):
            check_decoded_size(frame.width, frame.height, field)
            yield index, frame
