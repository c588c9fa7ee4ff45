"""How large an image or a frame becomes, and which frames of a video are taken: arithmetic alone.

Rules: `smart_resize`, `smart_nframes` and `fetch_video` of qwen-vl-utils.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..config.engine_config import PreprocessConfig
from ..config.media_limits import MediaLimits
from ..errors import InputError
from .options import MediaOptions

MAX_RATIO = 200
FRAME_FACTOR = 2
NO_LIMIT = 1 << 62
VIDEO_SHARE = 0.9  # of max_model_len that a video takes at most, where its caller says nothing
MIN_SLACK = 1.05  # what a frame may have at least of pixels, as a multiple of min_pixels


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, field: str
) -> tuple[int, int]:
    """Height and width as multiples of `factor`, with an area between the two limits.

    Source: `smart_resize` of qwen-vl-utils. Raises `InputError` for a ratio over 200, and where
    that rule would leave a side of no pixels.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise InputError(
            field, f"{width}×{height} pixels: one side is over {MAX_RATIO} times the other; crop it"
        )
    new = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if new[0] * new[1] > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new = [math.floor(side / beta / factor) * factor for side in (height, width)]
    elif new[0] * new[1] < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new = [math.ceil(side * beta / factor) * factor for side in (height, width)]
    if min(new) < factor:
        least = math.ceil(factor**2 * max(height, width) / min(height, width))
        raise InputError(
            field,
            f"{width}×{height} pixels: max_pixels={max_pixels} leaves less than one token "
            f"({factor} pixels) of the shorter side; pass at least {least}, or crop",
        )
    return new[0], new[1]


def image_size(
    height: int,
    width: int,
    options: MediaOptions,
    preprocess: PreprocessConfig,
    factor: int,
    field: str,
) -> tuple[int, int]:
    """The size that an image is resized to. Limits of the item go before the server's."""
    if options.resized_height and options.resized_width:
        return exact_size(options.resized_height, options.resized_width, factor, field)
    low = options.min_pixels or min(preprocess.min_pixels, options.max_pixels or NO_LIMIT)
    high = options.max_pixels or max(preprocess.max_pixels, options.min_pixels or 0)
    return smart_resize(height, width, factor, low, high, field)


def exact_size(height: int, width: int, factor: int, field: str) -> tuple[int, int]:
    """The size that a caller asked for, to the next multiples; only the widest limits hold."""
    widest = PreprocessConfig()
    return smart_resize(height, width, factor, widest.min_pixels, widest.max_pixels, field)


def frame_range(options: MediaOptions, num_frames: int, fps: float, field: str) -> tuple[int, int]:
    """First and last frame between `video_start` and `video_end`, both of them taken in.

    Source: `calculate_video_frame_range` of qwen-vl-utils. Raises `InputError`.
    """
    if options.video_start is None and options.video_end is None:
        return 0, num_frames - 1
    lasts = num_frames / fps
    first, last = 0, num_frames - 1
    if options.video_start is not None and options.video_start >= lasts:
        raise InputError(
            f"{field}.video_start",
            f"{options.video_start} is behind the end of a video of {lasts:.3f} seconds",
        )
    if options.video_start is not None:
        first = math.ceil(min(options.video_start, lasts) * fps)
    if options.video_end is not None:
        last = min(math.floor(min(options.video_end, lasts) * fps), num_frames - 1)
    if first > last:
        name = "video_start" if options.video_end is None else "video_end"
        raise InputError(
            f"{field}.{name}",
            f"video_start={options.video_start} and video_end={options.video_end} leave no "
            f"frame of a video of {lasts:.3f} seconds",
        )
    return first, last


def with_room(
    preprocess: PreprocessConfig, options: MediaOptions, num_pixels: int
) -> PreprocessConfig:
    """The settings, with a `max_frames` for which `num_pixels` are enough at the least size that a
    frame may have: a long video fits by itself. What a caller says of frames stands."""
    asked = (options.nframes, options.min_frames, options.max_frames, options.resized_height)
    if any(value is not None for value in asked):
        return preprocess
    low = options.min_pixels or preprocess.video_min_pixels
    least = min(int(low * MIN_SLACK), options.max_pixels or NO_LIMIT)
    most = num_pixels * FRAME_FACTOR // least
    return replace(preprocess, max_frames=max(FRAME_FACTOR, min(preprocess.max_frames, most)))


def smart_nframes(
    options: MediaOptions,
    total_frames: int,
    video_fps: float,
    preprocess: PreprocessConfig,
    limits: MediaLimits,
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
    if not FRAME_FACTOR <= count <= total_frames:
        raise InputError(
            _frames_field(options, total_frames, field),
            f"{count} frames asked of a video of {total_frames} (numbers of frames are rounded to "
            f"even ones); must be {FRAME_FACTOR} to {max(FRAME_FACTOR, total_frames)}: change "
            "nframes, fps, min_frames or max_frames",
        )
    limits.check_frames(count, field)
    return count


def _frames_field(options: MediaOptions, total_frames: int, field: str) -> str:
    """The option that asks for more or fewer frames than a video can give, or the video itself."""
    if options.nframes is not None:
        return f"{field}.nframes"
    if options.max_frames is not None and total_frames >= FRAME_FACTOR:
        return f"{field}.max_frames"
    return field


def frame_indices(count: int, first: int, last: int) -> list[int]:
    """`count` frames evenly from first to last, rounded as torch.linspace rounds: to float32."""
    step = float(np.float32(last - first) / np.float32(count - 1))
    rising = np.arange(count, dtype=np.float64) * step
    half = np.arange(count) < count // 2
    places = np.where(half, first + rising, last - rising[::-1]).astype(np.float32)
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
    total = options.total_pixels or VIDEO_SHARE * max_model_len * factor**2
    high: float = max(
        min(preprocess.video_max_pixels, total / num_frames * FRAME_FACTOR),
        int(low * MIN_SLACK),
    )
    if options.max_pixels is not None:
        high = min(high, options.max_pixels)
        low = min(low, options.max_pixels)
    return smart_resize(height, width, factor, low, int(high), field)
