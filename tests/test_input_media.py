"""Where images and videos come from, and what is refused."""

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from octavo.benchmarks.media_cases import SHAPE, encoded, mp4, noise
from octavo.benchmarks.media_cases import load as load_media
from octavo.engine.config import PreprocessConfig
from octavo.engine.input_error import InputError
from octavo.engine.media.item import MediaInfo, make_unit, media_hash
from octavo.engine.media.limits import MediaLimits
from octavo.engine.media.loader import open_here
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.reader import MediaHeader, Pixels
from octavo.engine.media.source import MediaAccess, open_source
from octavo.engine.media.video import VideoFile

DEFAULTS = PreprocessConfig(video_min_pixels=28 * 28 * 4)


NOTHING = MediaAccess(roots=())


def load(source: Any, access: MediaAccess | None = None) -> Pixels:
    """The picture at its own size."""
    limits = MediaLimits()
    file = open_source(source, access or MediaAccess(), limits, "image")
    with open_here("image", file, limits, "image") as reader:
        size = reader.header
        return next(iter(reader.frames([0], size.height, size.width))).pixels


def test_every_source_is_the_same_picture(tmp_path: Path) -> None:
    image = noise()
    data = encoded(image)
    path = tmp_path / "a picture é.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    uri_path = str(path).replace(" ", "%20")
    sources = [path, str(path), f"file://{uri_path}", data, bytearray(data), image]
    sources += [f"data:image/png;base64,{text}", f"data:image;base64,{text}"]
    for source in sources:
        np.testing.assert_array_equal(load(source), np.asarray(image))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/no/such.png", "No such file"),
        ("/tmp", "directory"),
        ("", "directory|No such file|has no bytes"),
        ("a\x00b", "null"),
        ("http://example.com/a.png", "--allow-media-domains"),
        ("HTTPS://example.com/a.png", "--allow-media-domains"),
        ("data:image/png;base64,@@@", "base64"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,", "no bytes"),
        (b"", "no bytes"),
        (b"no picture", "not an image"),
        (encoded(noise())[:200], "broken|not an image"),
        (5, "int is no path"),
        (Image.new("RGB", (0, 5)), "no size"),
        (Image.new("RGB", (1, 201)), None),
    ],
)
def test_what_is_no_image_is_refused_clearly(source: Any, words: str | None) -> None:
    if words is None:
        load(source)
        return
    with pytest.raises(InputError, match=words) as refused:
        load(source)
    assert refused.value.field == "image"
    assert "0x" not in str(refused.value)


def test_a_server_reads_no_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise()))
    for source in (str(path), path, f"file://{path}"):
        with pytest.raises(InputError, match="send the bytes"):
            load(source, NOTHING)
    load(path.read_bytes(), NOTHING)


def test_L22_bombs_lists_of_frames_are_bounded() -> None:
    with pytest.raises(InputError, match="max-video-frames"):
        video([noise()] * (MediaLimits().max_video_frames + 1))


def test_L05_media_hash() -> None:
    """Shape, kind and every pixel are in it; a 30×150 and a 150×30 picture differ."""
    flat = np.zeros((1, 28, 56, 3), np.uint8)
    tall = np.zeros((1, 56, 28, 3), np.uint8)
    other = flat.copy()
    other[0, 27, 55, 2] = 1
    hashes = [media_hash("image", flat), media_hash("image", tall), media_hash("video", flat)]
    hashes.append(media_hash("image", other))
    assert len(set(hashes)) == 4
    assert media_hash("image", np.asfortranarray(flat)) == hashes[0]
    assert all(len(digest) == 32 for digest in hashes)
    unit = make_unit("image", flat, SHAPE)
    assert (unit.media_hash, unit.grid_thw) == (hashes[0], (1, 2, 4))


def video(source: Any, **options: Any) -> tuple[MediaInfo, Pixels]:
    item, pixels = load_media(
        "video", source, MediaOptions(**options), DEFAULTS, max_model_len=9000
    )
    return item.info, pixels


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


def test_a_file_with_fewer_frames_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few are lacking: the last that is there stands for them. Many are: refused."""

    def says(count: int) -> None:
        header = MediaHeader(48, 64, count, 10.0)
        monkeypatch.setattr(VideoFile, "_read_header", lambda self: header)

    says(32)
    info, pixels = video(mp4(30), nframes=16)
    assert info.frame_indices[-2:] == (29, 31) and pixels.shape[0] == 16
    np.testing.assert_array_equal(pixels[-1], pixels[-2])
    says(90)
    with pytest.raises(InputError, match="5 of the 16 frames"):
        video(mp4(30), nframes=16)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
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
        with pytest.raises(InputError, match="broken"):
            video(data[: int(len(data) * share)])


def test_frames_of_a_list(tmp_path: Path) -> None:
    stills = [noise(seed=i) for i in range(3)]
    stills[1].save(tmp_path / "b.png")
    info, pixels = video([encoded(stills[0]), f"file://{tmp_path}/b.png", stills[2]], fps=1.0)
    assert info.frame_indices == (0, 1, 2, 2)  # an odd list ends with its last frame twice
    assert (info.sample_fps, info.frame_times) == (1.0, (0.0, 1.0, 2.0, 2.0))
    np.testing.assert_array_equal(pixels[2], pixels[3])


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (b"", {}, "no bytes"),
        (b"not a video at all", {}, "mp4, mov, mkv, webm, avi"),
        (b"#EXTM3U\nhttp://10.0.0.1/a.ts", {}, "mp4, mov, mkv, webm, avi"),
        (mp4(10)[:300], {}, "broken"),
        (mp4(10)[:32] + bytes(500), {}, "broken"),
        (mp4(1), {}, "1 frames|of a video of 1"),
        (mp4(10), {"nframes": 12}, "2 to 10"),
        ([], {}, "0 frames"),
        ([noise(), noise(41, 30)], {}, "one size"),
        ([noise(), b"junk"], {}, r"video\[1\]"),
        ([noise(), noise()], {"nframes": 2}, "as they are"),
        (noise(), {}, "one image"),
        ("http://example.com/a.mp4", {}, "--allow-media-domains"),
    ],
)
def test_what_is_no_video_is_refused_clearly(
    source: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        video(source, **options)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"max_pixel": 5}, "max_pixel.*no option"),
        ({"fps": 2}, "no option"),
        ({"min_pixels": 0}, "over 0"),
        ({"min_pixels": -4}, "over 0"),
        ({"min_pixels": 2.5}, "whole number"),
        ({"min_pixels": True}, "whole number"),
        ({"min_pixels": "100"}, "whole number"),
        ({"max_pixels": float("nan")}, "whole number"),
        ({"max_pixels": 10**400}, "at most"),
        ({"max_pixels": 10**5000}, "at most"),
        ({"max_pixels": 1 << 60}, "at most"),
        ({"min_pixels": 9000, "max_pixels": 4000}, "over max_pixels"),
        ({"resized_height": 28}, "give both"),
    ],
)
def test_L09_pixels_ignored_bad_options_are_refused(part: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MediaOptions.from_part({"type": "image", "image": "x", **part}, "image", "part")


def test_video_options() -> None:
    part = {"type": "video", "video": [], "fps": 1, "total_pixels": 5000, "max_pixels": None}
    options = MediaOptions.from_part(part, "video", "part")
    assert options == MediaOptions(fps=1, total_pixels=5000)
    for wrong in ({"fps": float("inf")}, {"fps": 1, "nframes": 4}, {"fps": 0}):
        with pytest.raises(InputError):
            MediaOptions.from_part({"type": "video", **wrong}, "video", "part")


LONG_VIDEO = """
import resource, sys
from octavo.benchmarks.media_cases import load
from octavo.engine.media.options import MediaOptions
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, pixels = load("video", sys.argv[1], MediaOptions(fps=1.0), max_model_len=5000)
print(len(pixels), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_L12_video_memory(tmp_path: Path) -> None:
    """Frames are chosen first and only those are held: 1,200 decoded frames are 691 MB."""
    (tmp_path / "long.mp4").write_bytes(mp4(1200, rate=30, size=(480, 400)))
    command = [sys.executable, "-P", "-c", LONG_VIDEO, str(tmp_path / "long.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    frames, kilobytes = map(int, done.stdout.split())
    assert frames == 40
    assert kilobytes < 120_000


def test_limits_are_read_in_both_forms(tmp_path: Path) -> None:
    size = '"size": {"shortest_edge": 6272, "longest_edge": 50176}'
    for name, text in (
        ("preprocessor_config.json", '{"min_pixels": 6272, "max_pixels": 50176}'),
        ("preprocessor_config.json", f"{{{size}}}"),
        ("preprocessor_config.json", f'{{"min_pixels": null, "max_pixels": null, {size}}}'),
        ("processor_config.json", f'{{"image_processor": {{{size}}}}}'),
    ):
        (tmp_path / name).write_text(text)
        found = PreprocessConfig.from_dir(tmp_path)
        assert (found.min_pixels, found.max_pixels) == (6272, 50176), text
        assert found.video_max_pixels == 768 * 784
        (tmp_path / name).unlink()


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    Qwen2VLImageProcessorPil(min_pixels=6272, max_pixels=50176).save_pretrained(tmp_path)
    found = PreprocessConfig.from_dir(tmp_path)
    assert (found.min_pixels, found.max_pixels) == (6272, 50176)
