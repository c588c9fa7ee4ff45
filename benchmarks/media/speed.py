"""Speed of media preprocessing, compared with the bare decoding library."""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any

import av
import numpy as np
from PIL import Image
from rich.table import Table

from octavo.engine.config.engine_config import PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.media.decode.opening import OpenReader, open_here
from octavo.engine.media.item import MediaInfo
from octavo.engine.media.loader import MediaLoader
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.sandbox.pool import DecoderPool
from octavo.engine.media.source import MediaAccess
from octavo.engine.media.task import MediaTask
from octavo.engine.media.token_budget import MediaTokenBudget

from .cases import SHAPE, encoded, photo
from .video_cases import X264, clip

SIZES = ((640, 480), (1920, 1080), (4000, 3000))
VIDEO_SIZES = ((854, 480), (1920, 1080))
VIDEO_FRAMES = 150  # five seconds
SMALL = 448 * 336  # pixels; a JPEG of the largest size is then decoded at half resolution
AT_LEAST = 0.04  # minimum seconds per run, reached by repetition
THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Case:
    """Two ways to compute the same pixels; results are discarded."""

    name: str
    ours: Callable[[OpenReader], object]
    bare: Callable[[], object]


@dataclass(frozen=True)
class Speed:
    """Items per second on one thread, and ratios (medians over pairs of consecutive runs)."""

    name: str
    ours: float
    bare: float
    times_bare: float  # our time / bare time
    times_here: float  # our time in a decoder process / in this process
    num_threads: int
    pool: float  # throughput of `num_threads` threads / of one thread

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prepare(
    kind: str, data: bytes, options: MediaOptions, open_reader: OpenReader = open_here
) -> MediaInfo:
    """Run our complete preprocessing: bytes, reader, size, pixels, unit hashes."""
    access, limits = MediaAccess(roots=()), MediaLimits()
    loader = MediaLoader(PreprocessConfig(), SHAPE, access, limits)
    budget = MediaTokenBudget(128_000, 0, 1, SHAPE.factor)
    task = MediaTask(limits, open_reader)
    opened = loader.open(kind, data, options, budget, kind, task)
    for _ in loader.units([opened], task):
        pass
    return opened.item.info


def bare_image(data: bytes, height: int, width: int) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def image_case(name: str, data: bytes, max_pixels: int | None = None) -> Case:
    options = MediaOptions(max_pixels=max_pixels)
    info = prepare("image", data, options)
    return Case(
        f"{name} → {info.width}×{info.height}",
        lambda open_reader: prepare("image", data, options, open_reader),
        lambda: bare_image(data, info.height, info.width),
    )


def bare_video(data: bytes, indices: Collection[int], height: int, width: int) -> None:
    """Decode as far as needed; convert the chosen frames to RGB and resize them with Pillow."""
    container: Any = av.open(io.BytesIO(data))
    with container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index in indices:
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
            if index >= max(indices):
                return


def video_case(name: str, data: bytes) -> Case:
    info = prepare("video", data, MediaOptions())
    indices = frozenset(info.frame_indices)
    return Case(
        f"{name}, {info.num_frames} frames → {info.width}×{info.height}",
        lambda open_reader: prepare("video", data, MediaOptions(), open_reader),
        lambda: bare_video(data, indices, info.height, info.width),
    )


def cases() -> Iterator[Case]:
    for width, height in SIZES:
        image = photo(width, height)
        jpeg = encoded(image, "JPEG", quality=90)
        yield image_case(f"JPEG {width}×{height}", jpeg)
        yield image_case(f"PNG {width}×{height}", encoded(image, "PNG", compress_level=1))
        if (width, height) == SIZES[-1]:
            yield image_case(f"JPEG {width}×{height}", jpeg, SMALL)
    for width, height in VIDEO_SIZES:
        data = clip("libx264", "mp4", VIDEO_FRAMES, 30, (width, height), 60, X264)
        yield video_case(f"H.264 {width}×{height}", data)


def measure(case: Case, rounds: int) -> Speed:
    """Time ours and bare alternately, here and in a decoder process, on one and many threads."""

    def ours() -> object:
        return case.ours(open_here)

    repeats = max(1, round(AT_LEAST / seconds(case.bare, 1)))
    pairs = [(seconds(ours, repeats), seconds(case.bare, repeats)) for _ in range(rounds)]
    with ExitStack() as stack:
        pool = stack.enter_context(closing(DecoderPool(MediaLimits(), 1)))
        lease = stack.enter_context(pool.lease())
        case.ours(lease)  # starts the process
        separate = [
            (seconds(ours, repeats), seconds(lambda: case.ours(lease), repeats))
            for _ in range(rounds)
        ]
    with ThreadPoolExecutor(THREADS) as threads:
        both = [
            (seconds(ours, repeats * THREADS), _pooled(threads, ours, repeats))
            for _ in range(rounds)
        ]
    return Speed(
        case.name,
        ours=repeats / statistics.median(ours for ours, _ in pairs),
        bare=repeats / statistics.median(bare for _, bare in pairs),
        times_bare=statistics.median(ours / bare for ours, bare in pairs),
        times_here=statistics.median(there / here for here, there in separate),
        num_threads=THREADS,
        pool=statistics.median(one / many for one, many in both),
    )


def seconds(work: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return time.perf_counter() - begin


def _pooled(pool: ThreadPoolExecutor, work: Callable[[], object], repeats: int) -> float:
    """Return the seconds in which each of `THREADS` threads does the work `repeats` times."""
    begin = time.perf_counter()
    for done in [pool.submit(work) for _ in range(repeats * THREADS)]:
        done.result()
    return time.perf_counter() - begin


def table(found: list[Speed]) -> Table:
    found_threads = found[0].num_threads if found else THREADS
    title = f"Items per second on one thread; speedup of {found_threads} threads"
    shown = Table(title=title, title_justify="left")
    shown.add_column("item")
    columns = ("ours", "bare", "our time / bare", "process / here", f"{found_threads} threads")
    for column in columns:
        shown.add_column(column, justify="right")
    for row in found:
        ratios = (row.times_bare, row.times_here, row.pool)
        shown.add_row(
            row.name,
            f"{row.ours:.1f}",
            f"{row.bare:.1f}",
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    return shown
