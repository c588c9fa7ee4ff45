"""What decoding in a process of its own costs, against decoding here: `python -m
octavo.benchmarks.media_child`. Pairs in turn, so that both see the same machine; medians."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import av
import numpy as np
from PIL import Image

from octavo.benchmarks.media_cases import SHAPE, encoded
from octavo.engine.config import PreprocessConfig
from octavo.engine.media.child_pool import DecoderPool
from octavo.engine.media.limits import MediaLimits
from octavo.engine.media.opening import OpenReader, open_here
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.reader import Pixels
from octavo.engine.media.sizes import image_size

SIZES = ((640, 480), (1920, 1080), (4000, 3000))
VIDEO_SIZE, VIDEO_FRAMES, VIDEO_STEP = (1920, 1080), 90, 3


@dataclass(frozen=True)
class Row:
    name: str
    here_ms: float  # in this process
    child_ms: float
    ratio: float  # of the pairs, in the middle


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft shapes with some grain: about as hard to code as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(-8, 9, (height, width, 1), np.int16)
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))


def video_clip(width: int, height: int, num_frames: int) -> bytes:
    """H.264; the scene moves sideways."""
    buffer, pixels = io.BytesIO(), np.asarray(scene(width + num_frames * 4, height))
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            view = np.ascontiguousarray(pixels[:, 4 * i : 4 * i + width])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def load(
    kind: str, data: bytes, open_reader: OpenReader, indices: list[int], limits: MediaLimits
) -> Pixels:
    """The last frame, after the size and the copies that `MediaLoader` makes of each."""
    with open_reader(kind, io.BytesIO(data), limits, kind) as reader:
        header = reader.header
        options = MediaOptions(max_pixels=768 * 784) if kind == "video" else MediaOptions()
        size = image_size(
            header.height, header.width, options, PreprocessConfig(), SHAPE.factor, kind
        )
        pixels = np.empty((1, *size, 3), np.uint8)
        for frame in reader.frames(indices, *size):
            pixels[0] = frame.pixels
    return pixels


def compare(name: str, rounds: int, here: Callable[[], object], child: Callable[[], object]) -> Row:
    times: list[list[float]] = [[], []]
    for i in range(rounds + 1):
        for which in (0, 1) if i % 2 else (1, 0):
            began = time.perf_counter()
            (here, child)[which]()
            if i:  # the first round warms up
                times[which].append((time.perf_counter() - began) * 1e3)
    ratios = [theirs / ours for ours, theirs in zip(*times, strict=True)]
    here_ms, child_ms = map(statistics.median, times)
    return Row(name, here_ms, child_ms, statistics.median(ratios))


def run(rounds: int = 20) -> Iterator[Row]:
    limits = MediaLimits()
    cases = [
        (f"JPEG {width}×{height}", "image", encoded(scene(width, height), "JPEG"), [0], rounds)
        for width, height in SIZES
    ]
    indices = list(range(0, VIDEO_FRAMES, VIDEO_STEP))
    clip = video_clip(*VIDEO_SIZE, VIDEO_FRAMES)
    name = f"H.264 1920×1080, {len(indices)} of {VIDEO_FRAMES} frames"
    cases.append((name, "video", clip, indices, max(3, rounds // 4)))
    pool = DecoderPool(limits, 1)
    for name, kind, data, wanted, count in cases:

        def here(kind: str = kind, data: bytes = data, wanted: list[int] = wanted) -> Pixels:
            return load(kind, data, open_here, wanted, limits)

        def child(kind: str = kind, data: bytes = data, wanted: list[int] = wanted) -> Pixels:
            with pool.lease() as open_reader:
                return load(kind, data, open_reader, wanted, limits)

        yield compare(name, count, here, child)
    pool.close()


def main() -> None:
    print(f"{'file':<34} {'here':>9} {'process':>9}  ratio")
    for row in run():
        print(
            f"{row.name:<34} {row.here_ms:>6.1f} ms {row.child_ms:>6.1f} ms  {row.ratio:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
