"""Videos: which are read, which frames come of them, and how they are shown."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import pytest
import torch
from PIL import Image

from octavo.benchmarks.media.cases import SHAPE, encoded, mp4, noise
from octavo.benchmarks.media.cases import load as load_media
from octavo.benchmarks.media.video_cases import clip, moving, repeated
from octavo.engine.config.engine_config import PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import InputError
from octavo.engine.media.decode import video_decode
from octavo.engine.media.decode.opening import open_video as open_reader
from octavo.engine.media.decode.reader import Frame, MediaHeader, MediaReader, Pixels
from octavo.engine.media.decode.resample import resize_frame
from octavo.engine.media.decode.video import VideoFile
from octavo.engine.media.decode.video_index import VideoIndex
from octavo.engine.media.item import MediaInfo
from octavo.engine.media.loader import MediaLoader
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.sizes import frame_indices, frame_range
from octavo.engine.media.source import MediaAccess
from octavo.engine.media.task import MediaTask
from octavo.engine.media.token_budget import MediaTokenBudget

LIMITS = MediaLimits()
DEFAULTS = PreprocessConfig(video_min_pixels=28 * 28 * 4)
VP9 = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "8"}
X264_FAST = {"preset": "veryfast"}
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


def open_video(data: bytes, limits: MediaLimits = LIMITS) -> MediaReader:
    return open_reader(io.BytesIO(data), limits, "video")


def video(source: Any, **options: Any) -> tuple[MediaInfo, Pixels]:
    item, pixels = load_media(
        "video", source, MediaOptions(**options), DEFAULTS, max_model_len=9000
    )
    return item.info, pixels


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


@pytest.fixture
def no_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeks must do: nothing is decoded straight through."""

    def fail(*args: Any) -> Iterator[Any]:
        raise AssertionError("it lost its place")

    monkeypatch.setattr(video_decode, "_straight_through", fail)


@pytest.mark.parametrize("case", CASES)
def test_frames_are_those_of_the_whole_file(case: str, request: pytest.FixtureRequest) -> None:
    """Count, times and pixels, whichever frames are chosen."""
    if case != "h264-refresh":  # which has no keyframes but the first: seeks find no way in
        request.getfixturevalue("no_way_back")
    data = made(case)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
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


def test_groups_without_chosen_frames_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what comes in a group after the last that is wanted."""
    count = 0
    real = video_decode._decoded

    def counted(context: Any, packet: Any) -> Any:
        nonlocal count
        count += packet is not None
        return real(context, packet)

    with open_video(clip("libx264", gop=12, num_frames=120)) as reader:
        monkeypatch.setattr(video_decode, "_decoded", counted)
        found = [frame.index for frame in reader.frames([3, 63, 110], 28, 28)]
    assert found == [3, 63, 110]
    assert count <= 8 + 8 + 8


def test_uneven_times_are_the_files(no_way_back: None) -> None:
    data = clip(num_frames=24, rate=10, steps={4: 20, 11: 3})
    times, _ = all_frames(data)
    assert times[5] == pytest.approx(2.4)
    with open_video(data) as reader:
        assert reader.header.fps == pytest.approx(23 / times[-1], rel=0.01)
        assert reader.times(range(24)) == pytest.approx(times)
        assert [frame.index for frame in reader.frames([5, 13, 20], 28, 28)] == [5, 13, 20]


@pytest.mark.lesson("L18")
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_exif_alpha_videos_are_upright(turn: int, flip: bool) -> None:
    """As phones film: the frames lie on their side, a matrix says how they are seen."""
    first = next(moving(1, (96, 64)))
    seen = np.rot90(first, turn // 90)
    seen = seen[:, ::-1] if flip else seen
    with open_video(clip(num_frames=4, turn=turn, flip=flip, options={"crf": "5"})) as reader:
        size = reader.header.height, reader.header.width
        assert size == ((64, 96) if turn % 180 == 0 else (96, 64))
        found = next(iter(reader.frames([0], *size))).pixels
        small = next(iter(reader.frames([0], size[0] // 2, size[1] // 2))).pixels
    assert np.abs(found.astype(int) - seen).mean() < 12
    assert np.abs(small.astype(int) - resize_frame(found, *small.shape[:2])).max() <= 1


def remuxed(data: bytes, packets: slice, shift: int = 0, form: str = "mp4") -> bytes:
    """Some of a file's packets, in a new file, `shift` frames earlier."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=form) as target:
        video = source.streams.video[0]
        stream = target.add_stream_from_template(video)
        step = round(1 / (video.average_rate * video.time_base))
        for packet in [p for p in source.demux(video) if p.size][packets]:
            packet.pts, packet.dts = packet.pts - shift * step, packet.dts - shift * step
            packet.stream = stream
            target.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("case", ["h264-mp4", "h264-open", "hevc-open", "mpeg4-mp4", "vp9-mp4"])
@pytest.mark.parametrize("first", [12, 17])
def test_a_stream_that_begins_within_a_group(case: str, first: int) -> None:
    """What no keyframe of the file is for is not shown, nor counted."""
    whole = made(case)
    data = remuxed(whole, slice(first, None), form="matroska")
    _, pixels = all_frames(whole)
    with open_video(data) as reader:
        count = reader.header.num_frames
        found = [frame.pixels for frame in reader.frames(range(count), 64, 96)]
    assert 24 <= count <= 36 and len(found) == count
    for ours, expected in zip(found, pixels[-count:], strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_what_an_edit_list_cuts_away_is_not_counted(no_way_back: None) -> None:
    data = remuxed(made("mpeg4-mp4"), slice(None), shift=5)
    times, pixels = all_frames(data)
    assert len(pixels) == 43
    with open_video(data) as reader:
        assert reader.header.num_frames == 43
        assert reader.times([42]) == pytest.approx([times[42]])
        for frame in reader.frames([0, 1, 20, 42], 64, 96):
            np.testing.assert_array_equal(frame.pixels, pixels[frame.index])


def test_a_lying_index_is_found_out() -> None:
    """Where seeks come to other frames than the index says, the file is decoded from its begin."""
    data = made("h264-mp4")
    _, pixels = all_frames(data)
    with open_video(data) as reader:
        assert isinstance(reader, VideoFile)
        index = reader._index
        reader._index = VideoIndex(
            index.pts, np.array([0, 20, 30, 41]), index.packets, index.time_base
        )
        found = list(reader.frames([5, 21, 31, 44], 64, 96))
    assert [frame.index for frame in found] == [5, 21, 31, 44]
    for frame in found:
        np.testing.assert_array_equal(frame.pixels, pixels[frame.index])


def test_without_time_stamps_frames_are_counted() -> None:
    data = made("mpeg4-mkv")
    _, pixels = all_frames(data)
    with open_video(data) as reader:
        assert isinstance(reader, VideoFile)
        index = reader._index
        reader._index = VideoIndex(
            index.pts * 0, index.keys, np.arange(48), index.time_base, is_exact=False
        )
        assert reader.times([24]) == [1.0]
        found = list(reader.frames([3, 40], 64, 96))
    for frame, place in zip(found, (3, 40), strict=True):
        np.testing.assert_array_equal(frame.pixels, pixels[place])


@pytest.mark.lesson("L23")
@pytest.mark.parametrize("codec", ["mpeg2video", "ffv1", "libvpx"])
def test_codec_others_are_rejected_before_they_run(codec: str) -> None:
    """The text says which are read, and nothing that a decoder said."""
    with pytest.raises(InputError, match=r"one of H\.264, HEVC, VP9, AV1, MPEG-4") as refused:
        open_video(clip(codec, "matroska", num_frames=6))
    assert "0x" not in str(refused.value) and codec not in str(refused.value)


@pytest.mark.lesson("L23")
@pytest.mark.parametrize("form", ["avi", "mpegts", "flv", "mpeg"])
def test_codec_other_containers_are_rejected(form: str) -> None:
    codec = "mpeg2video" if form == "mpeg" else "libx264" if form == "flv" else "mpeg4"
    with pytest.raises(InputError, match=r"\(MP4, MOV, MKV, WebM\)"):
        open_video(clip(codec, form, num_frames=6))


def with_other_streams() -> bytes:
    """An MP4 whose first stream is sound; a picture of another size follows the video."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        sound = file.add_stream("aac", rate=8000, layout="mono")
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        noise_of = np.random.default_rng(0)
        for i, pixels in enumerate(moving(20, (96, 64))):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            wave = noise_of.random((1, 800), np.float32)
            audio = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            audio.sample_rate, audio.pts, audio.time_base = 8000, 800 * i, Fraction(1, 8000)
            file.mux(sound.encode(audio))
        file.mux(stream.encode(None))
        file.mux(sound.encode(None))
    return buffer.getvalue()


def test_only_the_video_of_a_file_is_read(no_way_back: None) -> None:
    data = with_other_streams()
    _, pixels = all_frames(data)
    with open_video(data) as reader:
        assert reader.header.num_frames == 20
        (found,) = reader.frames([15], 64, 96)
    np.testing.assert_array_equal(found.pixels, pixels[15])


def test_a_file_of_sound_is_rejected() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        audio = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        audio.sample_rate = 8000
        file.mux(stream.encode(audio))
        file.mux(stream.encode(None))
    with pytest.raises(InputError, match="no video"):
        open_video(buffer.getvalue())


def damaged(data: bytes, places: range, first: int = 0, count: int = 64) -> bytes:
    """The file with some of those packets' bytes made other ones."""
    whole = bytearray(data)
    with av.open(io.BytesIO(data)) as file:
        for place, packet in enumerate(file.demux(video=0)):
            if place in places and packet.size:
                for at in range(packet.pos + first, packet.pos + first + count):
                    whole[at] ^= 0x7F
    return bytes(whole)


def test_a_file_with_damaged_frames() -> None:
    """A few are lacking: the one before stands for each. Many are: refused."""
    data = clip("libvpx-vp9", "mp4", num_frames=40, gop=1, rate=10, options={"cpu-used": "8"})
    whole = video(data, nframes=40)[1]
    info, pixels = video(damaged(data, range(20, 22)), nframes=40)
    assert info.num_frames == len(pixels) == 40
    for place in range(40):
        np.testing.assert_array_equal(pixels[place], whole[19 if 20 <= place < 22 else place])
    with pytest.raises(InputError, match="at least 10 of the 40"):
        video(damaged(data, range(20, 30)), nframes=40)


JUMP = """
import io, sys
from octavo.engine.errors import InputError
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.media.source import MediaAccess
from octavo.engine.media.task import MediaTask
from octavo.engine.media.decode.video import VideoFile
reader = VideoFile(io.BytesIO(open(sys.argv[1], "rb").read()), MediaLimits(), "video")
print([frame.index for frame in reader.frames([0, 47], 64, 96)])
"""


@pytest.mark.lesson("L23")
@pytest.mark.parametrize("case", ["vp9-mp4", "h264-mp4", "hevc-mp4", "av1-mp4", "mpeg4-mp4"])
def test_codec_a_jump_to_a_broken_keyframe(case: str, tmp_path: Path) -> None:
    """In a process of its own: FFmpeg's VP9 decoder has crashed of it."""
    (tmp_path / "video").write_bytes(damaged(made(case), range(36, 37), first=3, count=1))
    command = [sys.executable, "-P", "-c", JUMP, str(tmp_path / "video")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("[0")


@pytest.mark.lesson("L22")
@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (MediaLimits(max_media_pixels=96 * 64 - 1), "--max-media-pixels"),
        (MediaLimits(max_video_seconds=1), "--max-video-seconds"),
    ],
)
def test_bombs_videos_are_bounded(limits: MediaLimits, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_video(made("h264-mp4"), limits)


def animated(form: str, durations: list[int]) -> bytes:
    """Frame i has a square at column 2 * i, on a ground that is clear; Pillow's WebP is white."""
    frames = []
    for i in range(len(durations)):
        ground = (0, 0, 0, 0) if form == "GIF" else (255, 255, 255, 255)
        frame = Image.new("RGBA", (48, 32), ground)
        frame.paste((200, 0, 0, 255), (2 * i, 8, 2 * i + 8, 16))
        frames.append(frame)
    options = {"lossless": True} if form == "WEBP" else {"disposal": 2}
    return encoded(
        frames[0], form, save_all=True, append_images=frames[1:], duration=durations, **options
    )


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_animations_are_videos(form: str) -> None:
    data = animated(form, [100, 100, 300, 100, 200, 100, 100, 200])
    with open_video(data) as reader:
        header = reader.header
        assert (header.height, header.width, header.num_frames) == (32, 48, 8)
        assert header.fps == pytest.approx(8 / 1.2)
        assert reader.times([0, 2, 3, 7]) == pytest.approx([0, 0.2, 0.5, 1.0])
        for frame in reader.frames([0, 3, 7], 32, 48):
            seen = np.full((32, 48, 3), 255)
            seen[8:16, 2 * frame.index : 2 * frame.index + 8] = (200, 0, 0)
            np.testing.assert_array_equal(frame.pixels, seen)
    info, pixels = video(data, nframes=4)
    assert info.frame_indices == (0, 2, 5, 7) and pixels.shape[0] == 4


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_broken_animations_are_rejected(form: str) -> None:
    data = animated(form, [100] * 8)
    with pytest.raises(InputError, match=r"corrupt|of a video of"):
        video(data[: len(data) // 4])
    with pytest.raises(InputError, match="--max-video-seconds"):
        open_video(data, MediaLimits(max_video_seconds=0))
    with pytest.raises(InputError, match="--max-media-pixels"):
        open_video(data, MediaLimits(max_media_pixels=100))


def test_frames_are_resized_as_torchvision_does() -> None:
    rng = np.random.default_rng(0)
    sizes = [(90, 160, 28, 56), (31, 17, 84, 56), (480, 854, 252, 448), (1, 200, 28, 2800)]
    for height, width, new_height, new_width in sizes:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(pixels).permute(2, 0, 1)[None].float(),
            (new_height, new_width),
            mode="bicubic",
            antialias=True,
        )
        expected = expected[0].round().clamp(0, 255).permute(1, 2, 0).numpy()
        found = resize_frame(pixels, new_height, new_width)
        assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [
        (None, None, (0, 99)),
        (2, None, (20, 99)),
        (None, 3, (0, 30)),
        (2.01, 3.09, (21, 30)),
        (0, 50, (0, 99)),
        (9.8, 10, (98, 99)),
    ],
)
def test_part_of_a_video(start: float | None, end: float | None, found: tuple[int, int]) -> None:
    """As `calculate_video_frame_range` of qwen-vl-utils 0.0.14 found, at 10 frames a second."""
    options = MediaOptions(video_start=start, video_end=end)
    assert frame_range(options, 100, 10.0, "video") == found


def test_frames_of_a_part_are_torchs() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        first = int(rng.integers(0, 100_000))
        last = first + int(rng.integers(2, 100_000))
        count = min(last - first + 1, 2 * int(rng.integers(1, 384)))
        if count >= 2:
            expected = torch.linspace(first, last, count).round().long().tolist()
            assert frame_indices(count, first, last) == expected


@pytest.mark.lesson("L09")
@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"video_start": 3.0}, "video.video_start"),
        ({"video_start": 2.95}, "video.video_start"),
        ({"nframes": 32}, "video.nframes"),
        ({"nframes": 1}, "video.nframes"),
        ({"max_frames": 1}, "video.max_frames"),
        ({"nframes": 20, "video_end": 1.0}, "video.nframes"),
    ],
)
def test_pixels_ignored_what_a_video_cannot_give(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as refused:
        video(mp4(30), **options)
    assert refused.value.field == field


@pytest.mark.lesson("L09")
@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"fps": 1, "nframes": 4}, "part.fps"),
        ({"nframes": 4, "max_frames": 8}, "part.max_frames"),
        ({"min_frames": 9, "max_frames": 8}, "part.min_frames"),
        ({"video_start": 2, "video_end": 1}, "part.video_start"),
        ({"video_start": -1}, "part.video_start"),
        ({"fps": float("inf")}, "part.fps"),
        ({"fps": 0}, "part.fps"),
        ({"frames": 4}, "part"),
    ],
)
def test_pixels_ignored_video_options(part: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as refused:
        MediaOptions.from_part({"type": "video", **part}, "video", "part")
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({}, [0, 6, 12, 17, 23, 29]),
        ({"fps": 1.0}, [0, 10, 19, 29]),
        ({"nframes": 2}, [0, 29]),
        ({"fps": 4.0, "max_frames": 8}, [0, 4, 8, 12, 17, 21, 25, 29]),
        ({"fps": 0.1, "min_frames": 2}, [0, 29]),
    ],
)
def test_frames_of_a_file(options: dict[str, Any], indices: list[int]) -> None:
    info, pixels = video(mp4(30), **options)
    assert list(info.frame_indices) == indices
    assert info.sample_fps == pytest.approx(len(indices) / 3.0)
    for frame, index in zip(pixels, indices, strict=True):
        assert abs(float(frame.mean()) - 8 * index) < 6


def test_a_file_that_was_cut_off_is_rejected(tmp_path: Path) -> None:
    """With its index in front, so that what is left decodes."""
    path = tmp_path / "whole.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(30):
            file.mux(stream.encode(av.VideoFrame.from_image(noise(320, 240, seed=i))))
        file.mux(stream.encode(None))
    data = path.read_bytes()
    assert len(video(data)[1]) == 6
    for share in (0.3, 0.6):
        with pytest.raises(InputError, match="corrupt"):
            video(data[: int(len(data) * share)])


def test_frames_of_a_list(tmp_path: Path) -> None:
    stills = [noise(seed=i) for i in range(3)]
    stills[1].save(tmp_path / "b.png")
    info, pixels = video([encoded(stills[0]), f"file://{tmp_path}/b.png", stills[2]], fps=1.0)
    assert info.frame_indices == (0, 1, 2, 2)  # an odd list ends with its last frame twice
    assert (info.sample_fps, info.frame_times) == (1.0, (0.0, 1.0, 2.0, 2.0))
    np.testing.assert_array_equal(pixels[2], pixels[3])


@pytest.mark.lesson("L22")
def test_bombs_lists_of_frames_are_bounded() -> None:
    with pytest.raises(InputError, match="max-video-frames"):
        video([noise()] * (MediaLimits().max_video_frames + 1))


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (b"", {}, "no bytes"),
        (b"not a video at all", {}, "MP4, MOV, MKV, WebM"),
        (b"#EXTM3U\nhttp://10.0.0.1/a.ts", {}, "MP4, MOV, MKV, WebM"),
        (mp4(10)[:300], {}, "corrupt"),
        (mp4(10)[:32] + bytes(500), {}, "corrupt"),
        (mp4(10), {"nframes": 12}, "2 to 10"),
        ([], {}, "0 frames"),
        ([noise(), noise(49, 30)], {}, "may differ by at most"),
        ([noise(), b"junk"], {}, r"video\[1\]"),
        ([noise(), noise()], {"nframes": 2}, "all frames of a list are used"),
        (noise(), {}, "a single image"),
        ("http://example.com/a.mp4", {}, "--allow-media-domains"),
    ],
)
def test_what_is_no_video_is_rejected_clearly(
    source: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        video(source, **options)


def test_video_options() -> None:
    part = {"type": "video", "video": [], "fps": 1, "total_pixels": 5000, "max_pixels": None}
    options = MediaOptions.from_part(part, "video", "part")
    assert options == MediaOptions(fps=1, total_pixels=5000)
    for wrong in ({"fps": float("inf")}, {"fps": 1, "nframes": 4}, {"fps": 0}):
        with pytest.raises(InputError):
            MediaOptions.from_part({"type": "video", **wrong}, "video", "part")


LONG_VIDEO = """
import resource, sys
from octavo.benchmarks.media.cases import load
from octavo.engine.media.options import MediaOptions
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, pixels = load("video", sys.argv[1], MediaOptions(fps=1.0), max_model_len=5000)
print(len(pixels), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.lesson("L12")
def test_video_memory(tmp_path: Path) -> None:
    """Frames are chosen first and only those are held: 1,200 decoded frames are 691 MB."""
    (tmp_path / "long.mp4").write_bytes(mp4(1200, rate=30, size=(480, 400)))
    command = [sys.executable, "-P", "-c", LONG_VIDEO, str(tmp_path / "long.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    frames, kilobytes = map(int, done.stdout.split())
    assert frames == 40
    assert kilobytes < 120_000


VERY_LONG = """
import sys
from octavo.benchmarks.media.video import measure_here
load = measure_here(sys.argv[1], 0.1)
print(load.frames, int(load.extra_mb))
"""


@pytest.mark.lesson("L12")
@pytest.mark.slow
def test_video_memory_of_half_an_hour(tmp_path: Path) -> None:
    """30 minutes of 1080p: at most 400 MB beyond the frames that are kept."""
    part = clip(num_frames=300, rate=30, size=(1920, 1080), gop=60, options=X264_FAST)
    repeated(part, 180, tmp_path / "long.mp4")
    command = [sys.executable, "-P", "-c", VERY_LONG, str(tmp_path / "long.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    frames, megabytes = map(int, done.stdout.split())
    assert frames == 180
    assert megabytes < 400


class HalfAnHour:
    """What is known of a file before it is decoded."""

    header = MediaHeader(1080, 1920, 54_000, 30.0)

    def times(self, indices: Sequence[int]) -> list[float]:
        return [index / 30 for index in indices]

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        raise AssertionError("nothing is decoded")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.mark.parametrize(("max_model_len", "count"), [(32768, 438), (65536, 768), (4096, 54)])
def test_a_long_video_fits_by_itself(max_model_len: int, count: int) -> None:
    """Half an hour would be 768 frames, 49,152 tokens at the least size that a frame may have."""
    loader = MediaLoader(PreprocessConfig(), SHAPE, MediaAccess(), MediaLimits())

    def choose(**options: Any) -> MediaInfo:
        room = MediaTokenBudget(max_model_len, 30, 1, SHAPE.factor)
        task = MediaTask(MediaLimits(), lambda *args: HalfAnHour())
        asked = MediaOptions(**options)
        return loader.open("video", b"x", asked, room, "video", task).item.info

    info = choose()
    assert info.num_frames == count
    assert 0.75 * max_model_len < info.num_tokens < 0.9 * max_model_len
    assert choose(fps=1.5).num_frames == count
    assert choose(fps=0.01).num_frames == 18
    if max_model_len < 65536:
        with pytest.raises(InputError, match="max_model_len"):  # what a caller says stands
            choose(nframes=768)
