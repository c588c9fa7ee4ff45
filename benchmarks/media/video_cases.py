"""Synthetic videos: a moving image in any codec and container that PyAV can write."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from octavo.engine.media.decode.reader import Pixels

QUIET = {"libx265": {"x265-params": "log-level=none"}}
X264 = {"preset": "veryfast"}


def moving(num_frames: int, size: tuple[int, int], seed: int = 0) -> Iterator[Pixels]:
    """Yield frames of a window that slides over a grainy texture with hard edges; all differ."""
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 8, width // 16 + 8, 3), np.uint8)
    whole = (2 * width, 2 * height)
    soft = Image.fromarray(coarse).resize(whole, Image.Resampling.BICUBIC)
    hard = Image.fromarray(coarse[::-1]).resize(whole, Image.Resampling.NEAREST)
    grain = rng.integers(-6, 7, (2 * height, 2 * width, 1), np.int8)
    blended = np.asarray(Image.blend(soft, hard, 0.3)).astype(np.int16)
    texture = (blended + grain).clip(0, 255).astype(np.uint8)
    for i in range(num_frames):
        x, y = 3 * i % width, i % height
        yield np.ascontiguousarray(texture[y : y + height, x : x + width])


@contextlib.contextmanager
def normal_scheduling() -> Iterator[None]:
    """Restore the calling thread's scheduling policy afterwards.

    When run as root, SVT-AV1 makes the encoding thread, and threads it starts later, preempt all
    other processes (SCHED_FIFO 99).
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@normal_scheduling()
def clip(
    codec: str = "libx264",
    form: str = "mp4",
    num_frames: int = 48,
    rate: int = 24,
    size: tuple[int, int] = (96, 64),
    gop: int = 12,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
    turn: int = 0,
    flip: bool = False,
    steps: Mapping[int, int] | None = None,
) -> bytes:
    """Encode a video file.

    `turn` is the counterclockwise rotation of the display matrix in degrees, `flip` mirrors
    horizontally after it, and `steps` maps frame indices to durations in frame times.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form, options=dict(container_options or {})) as file:
        given = {**QUIET.get(codec, {}), **(options or {})}
        stream: Any = file.add_stream(codec, rate=rate, options=given)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, rate)
        if turn or flip:
            stream.set_display_rotation(turn, hflip=flip)
        time = 0
        for i, pixels in enumerate(moving(num_frames, size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            time += (steps or {}).get(i, 1)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def repeated(data: bytes, times: int, path: Path, form: str = "mp4") -> None:
    """Write a file that plays a clip `times` times, by remuxing its packets."""
    with av.open(str(path), "w", format=form) as target:
        stream: Any = None
        shift = 0
        for _ in range(times):
            source: Any = av.open(io.BytesIO(data))
            with source:
                video = source.streams.video[0]
                stream = stream or target.add_stream_from_template(video)
                packets = [packet for packet in source.demux(video) if packet.size]
                step = round(1 / (video.average_rate * video.time_base))
                end = max(packet.pts for packet in packets) + step
                for packet in packets:
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    target.mux(packet)
            shift += end
