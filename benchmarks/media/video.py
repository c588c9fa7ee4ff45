"""Long videos: our decoding compared with bare PyAV, and cost by length.

    python -m octavo.benchmarks.media.video            # ours / bare, in one run
    python -m octavo.benchmarks.media.video --table    # the table of docs/media.md

The files are a ten-second clip, remuxed repeatedly.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from octavo.engine.config.engine_config import PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.media.decode.video import VideoFile
from octavo.engine.media.item import MediaInfo
from octavo.engine.media.loader import MediaLoader
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.source import MediaAccess
from octavo.engine.media.task import MediaTask
from octavo.engine.media.token_budget import MediaTokenBudget

from .cases import SHAPE
from .video_cases import X264, clip, repeated

MAX_MODEL_LEN = 32_768  # of the Qwen2-VL models
SECONDS = 10  # length of the clip
RATE = 30
GOP = 60
SIZES = {"480p": (854, 480), "1080p": (1920, 1080)}
MINUTES = (1, 10, 30, 60)
TABLE_FPS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Load:
    """Cost of choosing, decoding, resizing and hashing a video, measured in a new process."""

    seconds: float
    extra_mb: float  # peak memory in addition to the frames
    frames: int
    height: int
    width: int
    tokens: int


@dataclass(frozen=True)
class Row:
    name: str
    ours_s: float
    bare_s: float
    extra_mb: float


def load_kept(path: str, options: MediaOptions) -> tuple[MediaInfo, int]:
    """Load a video as a server does; return its info and the size of all frames in bytes."""
    loader = MediaLoader(PreprocessConfig(), SHAPE, MediaAccess(), MediaLimits())
    budget = MediaTokenBudget(MAX_MODEL_LEN, 0, 1, SHAPE.factor)
    task = MediaTask(MediaLimits())
    opened = loader.open("video", path, options, budget, "video", task)
    kept = list(loader.units([opened], task))
    return opened.item.info, sum(unit.pixels.nbytes for unit in kept if unit.pixels is not None)


def measure_here(path: str, fps: float | None) -> Load:
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak after the imports
    before, start = _memory_mb("VmRSS"), time.perf_counter()
    info, kept = load_kept(path, MediaOptions(fps=fps))
    seconds, extra = time.perf_counter() - start, _memory_mb("VmHWM") - before - kept / 1e6
    return Load(seconds, extra, info.num_frames, info.height, info.width, info.num_tokens)


def _memory_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(name + ":"))
    return int(found.split()[1]) * 1024 / 1e6


def measure(path: Path, fps: float | None) -> Load:
    """Run `measure_here` in a new process."""
    command = [sys.executable, "-P", "-m", "octavo.benchmarks.media.video", "--load", str(path)]
    if fps is not None:
        command += ["--fps", str(fps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Load(**json.loads(done.stdout))


def bare_groups(path: Path, fps: float | None) -> float:
    """Return the seconds in which bare PyAV decodes the GOPs that contain the chosen frames."""
    with VideoFile(path.open("rb"), MediaLimits(), "video") as video:
        wanted = _chosen(path, fps)
        index = video._index
    keys = np.searchsorted(index.keys, index.packets[wanted], side="right") - 1
    start = time.perf_counter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for group in dict.fromkeys(keys.tolist()):
            last = index.keys[group + 1] if group + 1 < len(index.keys) else len(index.pts)
            container.seek(int(index.pts[index.keys[group]]), stream=stream)
            _decode_frames(container, stream, int(last - index.keys[group]))
    return time.perf_counter() - start


def _chosen(path: Path, fps: float | None) -> list[int]:
    loader = MediaLoader(PreprocessConfig(), SHAPE, MediaAccess(), MediaLimits())
    budget = MediaTokenBudget(MAX_MODEL_LEN, 0, 1, SHAPE.factor)
    with closing(MediaTask(MediaLimits())) as task:
        opened = loader.open("video", str(path), MediaOptions(fps=fps), budget, "video", task)
        return list(dict.fromkeys(opened.item.info.frame_indices))


def _decode_frames(container: Any, stream: Any, count: int) -> None:
    for _ in container.decode(stream):
        count -= 1
        if count == 0:
            return


def long_file(folder: Path, name: str, minutes: float, gop: int = GOP) -> Path:
    """Write a file of `minutes` from a clip that is encoded once, unless it exists."""
    path = folder / f"{name}-{gop}-{minutes}.mp4"
    source = folder / f"{name}-{gop}.clip"
    if not source.exists():
        source.write_bytes(clip("libx264", "mp4", SECONDS * RATE, RATE, SIZES[name], gop, X264))
    if not path.exists():
        repeated(source.read_bytes(), round(minutes * 60 / SECONDS), path)
    return path


def video_rows(folder: Path) -> Iterator[Row]:
    """Yield comparisons with bare PyAV; the runs of each pair are consecutive."""
    for name, minutes, gop, fps in (
        ("1080p", 30, 250, 0.1),
        ("1080p", 30, 60, 0.1),
        ("1080p", 30, 60, None),
    ):
        path = long_file(folder, name, minutes, gop)
        load, bare = measure(path, fps), bare_groups(path, fps)
        label = f"{minutes} min {name}, GOP {gop}, fps={fps or 2.0}: bare decodes the GOPs"
        yield Row(label, load.seconds, bare, load.extra_mb)


def table(folder: Path) -> Iterator[str]:
    """Yield the table of docs/media.md, line by line as it is measured."""
    yield "| length | resolution | fps | frames | frame size | tokens | extra memory | time |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in SIZES:
        for minutes in MINUTES:
            path = long_file(folder, name, minutes)
            for rates in _alike(minutes):
                load = measure(path, rates[0])
                yield (
                    f"| {minutes} min | {name} | {', '.join(f'{fps:g}' for fps in rates)} "
                    f"| {load.frames} | {load.width}×{load.height} | {load.tokens} "
                    f"| {load.extra_mb:.0f} MB | {load.seconds:.1f} s |"
                )
            path.unlink()


def _alike(minutes: int) -> list[list[float]]:
    """Return the table's rates, grouping those that are all capped at the maximum of frames."""
    most = PreprocessConfig().max_frames
    full = [fps for fps in TABLE_FPS if minutes * 60 * fps >= most]
    return [[fps] for fps in TABLE_FPS if fps not in full] + ([full] if full else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", action="store_true", help="print the table of docs/media.md")
    parser.add_argument("--load", metavar="FILE", help="load one file and print its cost")
    parser.add_argument("--fps", type=float)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(vars(measure_here(args.load, args.fps))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.table:
            for line in table(Path(folder)):
                print(line, flush=True)
            return
        for row in video_rows(Path(folder)):
            ratio = row.ours_s / row.bare_s
            print(
                f"{row.name}: ours {row.ours_s:.2f} s, bare {row.bare_s:.2f} s, "
                f"{ratio:.2f} × bare, {row.extra_mb:.0f} MB in addition to the frames",
                flush=True,
            )


if __name__ == "__main__":
    main()
