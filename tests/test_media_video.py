"""Videos: which are read, which frames come of them, and how they are shown."""

import io
from itertools import pairwise
from typing import Any

import av
import numpy as np
import pytest

from octavo.benchmarks.video_cases import clip
from octavo.engine.input_error import InputError
from octavo.engine.media.limits import MediaLimits
from octavo.engine.media.reader import Pixels
from octavo.engine.media.video import VideoFile

LIMITS = MediaLimits()
VP9 = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "8"}
X264 = "keyint=12:min-keyint=12:scenecut=0:bframes=3"
CASES = {
    "h264-mp4": ("libx264", "mp4", {}, {}),
    "h264-mov": ("libx264", "mov", {}, {}),
    "h264-mkv": ("libx264", "matroska", {}, {}),
    "h264-fragments": ("libx264", "mp4", {}, {"movflags": "frag_keyframe+empty_moov"}),
    "h264-open": ("libx264", "mp4", {"x264-params": f"open-gop=1:{X264}"}, {}),
    "h264-refresh": ("libx264", "mp4", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}, {}),
    "hevc-mp4": ("libx265", "mp4", {}, {}),
    "hevc-mkv": ("libx265", "matroska", {}, {}),
    "hevc-open": ("libx265", "mov", {"x265-params": f"open-gop=1:log-level=none:{X264}"}, {}),
    "vp9-mp4": ("libvpx-vp9", "mp4", VP9, {}),
    "vp9-mkv": ("libvpx-vp9", "matroska", VP9, {}),
    "vp9-webm": ("libvpx-vp9", "webm", VP9, {}),
    "av1-mp4": ("libsvtav1", "mp4", {"preset": "12"}, {}),
    "av1-webm": ("libsvtav1", "webm", {"preset": "12"}, {}),
    "mpeg4-mp4": ("mpeg4", "mp4", {"bf": "2"}, {}),
    "mpeg4-mov": ("mpeg4", "mov", {"bf": "2"}, {}),
    "mpeg4-mkv": ("mpeg4", "matroska", {"bf": "2"}, {}),
}


def open_video(data: bytes, limits: MediaLimits = LIMITS) -> VideoFile:
    return VideoFile(io.BytesIO(data), limits, "video")


def all_frames(data: bytes) -> tuple[list[float], list[Pixels]]:
    """Times and pixels of a file that is decoded from begin to end."""
    with av.open(io.BytesIO(data)) as file:
        frames = list(file.decode(video=0))
    start = frames[0].time
    times = [frame.time - start for frame in frames]
    return times, [frame.to_ndarray(format="rgb24") for frame in frames]


def made(case: str) -> bytes:
    codec, form, options, container_options = CASES[case]
    try:
        return clip(codec, form, options=options, container_options=container_options)
    except (av.error.FFmpegError, av.codec.codec.UnknownCodecError):
        pytest.skip(f"PyAV cannot write {case} here")


@pytest.mark.parametrize("case", CASES)
def test_frames_are_those_of_the_whole_file(case: str) -> None:
    """Count, times and pixels, whichever frames are chosen."""
    data = made(case)
    times, pixels = all_frames(data)
    with open_video(data) as video:
        assert video.header.num_frames == len(pixels)
        assert video.header.fps == pytest.approx(24, rel=1e-3)
        for wanted in (range(len(pixels)), [0, 47], [20], [5, 11, 12, 40], [22, 23, 35, 36, 45]):
            found = list(video.frames(wanted, 64, 96))
            assert [frame.index for frame in found] == list(wanted)
            for frame in found:
                np.testing.assert_array_equal(frame.pixels, pixels[frame.index])
            assert video.times(wanted) == pytest.approx([times[i] for i in wanted], abs=1e-6)
