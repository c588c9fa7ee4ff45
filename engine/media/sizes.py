"""Compute target sizes of images and frames, and which frames of a video to sample.

Follows `smart_resize`, `smart_nframes` and `fetch_video` of qwen-vl-utils.
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
VIDEO_SHARE = 0.9  # maximum share of max_model_len for a video without total_pixels
MIN_SLACK = 1.05  # a frame's max_pixels is at least this multiple of its min_pixels


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, field: str
) -> tuple[int, int]:
    """Return height and width as multiples of `factor`, with an area between the two limits.

    Source: `smart_resize` of qwen-vl-utils. Raises `InputError` for an aspect ratio over 200, and
    if a side would be rounded down to 0 pixels.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise InputError(
            field,
            f"{width}×{height} pixels: one side is over {MAX_RATIO} times the other; crop it",
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
            f"({factor} pixels) on the shorter side; pass at least {least}, or crop the image",
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
    """Return the (height, width) to resize an image to; its own options override the server's."""
    if options.resized_height and options.resized_width:
        return exact_size(options.resized_height, options.resized_width, factor, field)
    low = options.min_pixels or min(preprocess.min_pixels, options.max_pixels or NO_LIMIT)
    high = options.max_pixels or max(preprocess.max_pixels, options.min_pixels or 0)
    return smart_resize(height, width, factor, low, high, field)


def exact_size(height: int, width: int, factor: int, field: str) -> tuple[int, int]:
    """Round a requested size to multiples of `factor`; only the default pixel limits apply."""
    widest = PreprocessConfig()
    return smart_resize(height, width, factor, widest.min_pixels, widest.max_pixels, field)


def frame_range(options: MediaOptions, num_frames: int, fps: float, field: str) -> tuple[int, int]:
    """Return the first and last frame index between `video_start` and `video_end`, inclusive.

    Source: `calculate_video_frame_range` of qwen-vl-utils. Raises `InputError` if no frame is left.
    """
    if options.video_start is None and options.video_end is None:
        return 0, num_frames - 1
    duration = num_frames / fps
    first, last = 0, num_frames - 1
    if options.video_start is not None and options.video_start >= duration:
        raise InputError(
            f"{field}.video_start",
            f"{options.video_start} is after the end of the video ({duration:.3f} seconds)",
        )
    if options.video_start is not None:
        first = math.ceil(min(options.video_start, duration) * fps)
    if options.video_end is not None:
        last = min(math.floor(min(options.video_end, duration) * fps), num_frames - 1)
    if first > last:
        name = "video_start" if options.video_end is None else "video_end"
        raise InputError(
            f"{field}.{name}",
            f"video_start={options.video_start} and video_end={options.video_end} select no "
            f"frame of a video of {duration:.3f} seconds",
        )
    return first, last


def with_room(
    preprocess: PreprocessConfig, options: MediaOptions, num_pixels: int
) -> PreprocessConfig:
    """Lower `max_frames` so that a long video fits into `num_pixels` at the minimum frame size.

    Options about the number or size of frames disable this.
    """
    given = (options.nframes, options.min_frames, options.max_frames, options.resized_height)
    if any(value is not None for value in given):
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
    """Return the number of frames to sample: even, at most `total_frames`.

    Raises `InputError` if the options ask for fewer than 2 frames or more than the video has.
    """
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
            f"{count} frames requested (rounded to an even number) from a video of {total_frames}; "
            f"must be {FRAME_FACTOR} to {max(FRAME_FACTOR, total_frames)}: change nframes, fps, "
            "min_frames or max_frames",
        )
    limits.check_frames(count, field)
    return count


def _frames_field(options: MediaOptions, total_frames: int, field: str) -> str:
    """Return the name of the option that causes the invalid number of frames, or of the video."""
    if options.nframes is not None:
        return f"{field}.nframes"
    if options.max_frames is not None and total_frames >= FRAME_FACTOR:
        return f"{field}.max_frames"
    return field


def frame_indices(count: int, first: int, last: int) -> list[int]:
    """Return `count` evenly spaced indices, with the float32 rounding of `torch.linspace`."""
    step = float(np.float32(last - first) / np.float32(count - 1))
    rising = np.arange(count, dtype=np.float64) * step
    half = np.arange(count) < count // 2
    positions = np.where(half, first + rising, last - rising[::-1]).astype(np.float32)
    return positions.round().astype(int).tolist()


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
    """Return the (height, width) to resize all frames to."""
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
