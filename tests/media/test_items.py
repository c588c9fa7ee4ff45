"""Items as qwen-vl-utils' users and OpenAI's clients write them: one frame, lists of nearly equal
frames, parts without a type, rates of sampled frames, limits below one token."""

import base64
import io
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from octavo.benchmarks.media.cases import SHAPE, encoded, load, mp4, noise
from octavo.engine.client.errors import ClientError
from octavo.engine.client.requests import conversation_of
from octavo.engine.config.engine_config import PreprocessConfig
from octavo.engine.errors import InputError
from octavo.engine.input.conversation import read_conversation
from octavo.engine.input.parsed_prompt import ParsedPrompt, PromptSize
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.sizes import frame_size, image_size

SIZES: dict[str, Any] = {"min_pixels": 784, "max_pixels": 12544}


def video(source: Any, **options: Any) -> Any:
    part = {"type": "video", "video": source, **SIZES, **options}
    return load("video", source, MediaOptions.from_part(part, "video", "video"))


def clip_of_one(codec: str, form: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.mux(stream.encode(av.VideoFrame.from_image(noise(64, 48))))
        file.mux(stream.encode(None))
    return buffer.getvalue()


ONE_FRAME = {
    "mp4": lambda: mp4(1),
    "h264": lambda: clip_of_one("libx264", "mp4"),
    "mkv": lambda: clip_of_one("mpeg4", "matroska"),
    "webm": lambda: clip_of_one("libvpx-vp9", "webm"),
    "gif": lambda: encoded(noise(64, 48), "GIF"),
    "webp": lambda: encoded(noise(64, 48), "WEBP", lossless=True),
    "list": lambda: [encoded(noise(64, 48))],
    "array": lambda: np.asarray(noise(64, 48))[None],
}


@pytest.mark.parametrize("name", ONE_FRAME)
def test_the_only_frame_of_a_video_is_repeated(name: str) -> None:
    """qwen-vl-utils and transformers pad to an even number of frames likewise."""
    item, pixels = video(ONE_FRAME[name]())
    assert (item.info.num_frames, item.grid_thw[0]) == (2, 1)
    assert item.info.frame_indices == (0, 0) and item.info.frame_times == (0.0, 0.0)
    assert item.info.sample_fps and item.info.sample_fps > 0
    np.testing.assert_array_equal(pixels[0], pixels[1])


def test_options_of_a_video_of_one_frame() -> None:
    data = mp4(1)
    for options in (
        {"fps": 1},
        {"fps": 0.01},
        {"nframes": 2},
        {"min_frames": 4, "max_frames": 8},
        {"video_start": 0.0, "video_end": 5.0},
    ):
        assert video(data, **options)[0].info.num_frames == 2
    with pytest.raises(
        InputError, match=r"video\.nframes: 4 frames requested .* from a video of 1"
    ):
        video(data, nframes=4)
    with pytest.raises(InputError, match=r"video\.video_start: 1.0 is after the end"):
        video(data, video_start=1.0)


def test_a_section_of_one_frame_is_repeated() -> None:
    item, _ = video(mp4(20), video_start=0.5, video_end=0.5)
    assert item.info.frame_indices == (5, 5) and item.info.frame_times == (0.5, 0.5)


# Lists of frames


@pytest.mark.parametrize("change", [(1, 0), (0, -1), (8, -8), (-3, 5)])
def test_frames_that_differ_by_a_few_pixels_become_one_size(change: tuple[int, int]) -> None:
    """Each is resized to the size that is chosen for the first."""
    other = noise(84 + change[0], 56 + change[1], seed=1)
    item, pixels = video([noise(84, 56), other, noise(84, 56)])
    assert pixels.shape == (4, 56, 84, 3) and item.info.num_frames == 4
    _, expected = video([other.resize((84, 56), Image.Resampling.BICUBIC)])
    assert np.abs(pixels[1].astype(int) - expected[0]).mean() < 3


def test_a_difference_of_five_percent_is_allowed_and_more_is_rejected_by_name() -> None:
    large = Image.new("RGB", (1000, 600))
    video([large, Image.new("RGB", (1050, 570))])
    for size in ((1051, 600), (1000, 569), (600, 1000), (500, 300)):
        with pytest.raises(InputError, match=r"video\[1\]: .*first frame 1000×600.*resize them"):
            video([large, Image.new("RGB", size)])


def test_sample_fps_is_the_rate_of_a_list() -> None:
    frames = [noise(seed=i) for i in range(4)]
    for source in (frames, np.stack([np.asarray(each) for each in frames])):
        info = video(source, sample_fps=4.0, raw_fps=29.97)[0].info
        assert (info.sample_fps, info.raw_fps) == (4.0, 29.97)
        assert info.frame_times == (0.0, 0.25, 0.5, 0.75)
        assert video(source, fps=4, sample_fps=4.0)[0].info.frame_times == info.frame_times
        assert video(source)[0].info.raw_fps is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sample_fps": 0}, "video.sample_fps: 0: must be greater than 0"),
        ({"raw_fps": -1.0}, "video.raw_fps: -1.0: must be greater than 0"),
        ({"sample_fps": "2"}, "video.sample_fps: '2': must be a number"),
        ({"raw_fps": float("nan")}, "video.raw_fps: nan: must be a number"),
        ({"sample_fps": 2, "fps": 1}, "video.sample_fps: 2 differs from fps=1.*pass one of"),
    ],
)
def test_rates_that_make_no_sense_are_rejected(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        video([noise()], **options)


def test_rates_of_sampling_are_not_of_files() -> None:
    for name in ("sample_fps", "raw_fps"):
        with pytest.raises(InputError, match=rf"video\.{name}: applies only to lists.*pass fps"):
            video(mp4(10), **{name: 2.0})
    server = MediaOptions(sample_fps=3.0, fps=1.0)
    assert MediaOptions(fps=5.0).over(server.of_files()).given == {"fps": 5.0}
    assert MediaOptions().over(server.of_lists()).given == {"sample_fps": 3.0}


# Parts without a type

URI = "data:image/png;base64," + base64.b64encode(encoded(noise())).decode()


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"text": "Hi"}, "text"),
        ({"image": URI}, "image"),
        ({"image": URI, "max_pixels": 12544}, "image"),
        ({"video": [URI, URI], "fps": 2.0}, "video"),
        ({"image_url": {"url": URI}}, "image"),
        ({"image_url": URI}, "image"),
        ({"video_url": {"url": URI}}, "video"),
        ({"type": None, "image": URI}, "image"),
    ],
)
def test_a_part_without_a_type_has_that_of_its_key(part: dict[str, Any], kind: str) -> None:
    talk = [{"role": "user", "content": [part]}]
    read = read_conversation(talk)
    assert read.messages[0]["content"][0]["type"] == kind
    served = read_conversation(talk, from_json=True)
    assert [each.source for each in served.media] == [each.source for each in read.media]
    sent = conversation_of(talk).messages[0].content[0]
    assert sent.WhichOneof("part") == ("text" if kind == "text" else "media")
    size = PromptSize.of(ParsedPrompt.of(talk))
    assert size.lane == {"text": "text", "image": "images", "video": "videos"}[kind]
    assert (size.source_bytes > 0) == (kind != "text")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({}, "it has none of these"),
        ({"url": URI}, "it has none of these"),
        ({"image": None}, "it has none of these"),
        ({"image": URI, "text": "Hi"}, "it has text and image"),
        ({"image": URI, "image_url": URI}, "it has image and image_url"),
    ],
)
def test_a_part_without_a_type_that_could_be_anything_is_rejected(
    part: dict[str, Any], words: str
) -> None:
    talk = [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}]
    for from_json in (False, True):
        with pytest.raises(InputError, match=words) as caught:
            read_conversation(talk, from_json=from_json)
        assert caught.value.field == "messages[0].content[0].type"
    with pytest.raises(ClientError, match=words):
        conversation_of(talk)


# Limits below one token

DEFAULTS = PreprocessConfig()


@pytest.mark.parametrize("name", ["max_pixels", "total_pixels"])
@pytest.mark.parametrize("value", [1, 100, 783])
def test_a_limit_below_one_token_is_what_is_wrong(name: str, value: int) -> None:
    """It was the aspect ratio that errors spoke of."""
    options = MediaOptions(**{name: value})  # type: ignore[arg-type]
    words = rf"part\.{name}: {value} is less than one token.*28×28 pixels; pass at least 784"
    with pytest.raises(InputError, match=words):
        options.check_size(SHAPE.factor, "part")
    MediaOptions(**{name: 784}).check_size(SHAPE.factor, "part")  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [28, 29, 100, 999])
def test_every_limit_from_one_token_on_suits_a_square(side: int) -> None:
    """As in qwen-vl-utils, a small image is rounded up, at most to the next token of each side."""
    for value in (784, 785, 1000, 1567, 1568, 50_000):
        options = MediaOptions(max_pixels=value)
        size = image_size(side, side, options, DEFAULTS, 28, "image")
        frame = frame_size(side, side, 2, options, DEFAULTS, 9000, 28, "video")
        for height, width in (size, frame):
            assert height >= 28 and width >= 28
            assert (height - 28) * (width - 28) <= value


def test_a_limit_too_small_for_an_image_says_which_would_do() -> None:
    for height, width in ((100, 400), (400, 100), (90, 100), (30, 5000)):
        with pytest.raises(InputError, match="max_pixels=800 leaves less than one token") as caught:
            image_size(height, width, MediaOptions(max_pixels=800), DEFAULTS, 28, "image")
        least = int(str(caught.value).split("pass at least ")[1].split(",")[0])
        size = image_size(height, width, MediaOptions(max_pixels=least), DEFAULTS, 28, "image")
        assert min(size) >= 28 and size[0] * size[1] <= least
    with pytest.raises(InputError, match="over 200 times the other"):
        image_size(10, 2001, MediaOptions(max_pixels=800), DEFAULTS, 28, "image")


def test_limits_of_item_and_server_in_every_combination() -> None:
    """None of them is an internal error, and each error names a limit or the image."""
    values = (1, 100, 784, 3136, 1 << 20, 1 << 40)
    for low in (None, *values):
        for high in (None, *values):
            for server in (DEFAULTS, DEFAULTS.limited(784, 784), DEFAULTS.limited(1 << 22, None)):
                given = {k: v for k, v in (("min_pixels", low), ("max_pixels", high)) if v}
                try:
                    options = MediaOptions.from_part(given, "image", "part")
                    options.check_size(28, "part")
                    height, width = image_size(200, 300, options, server, 28, "image")
                except InputError as error:
                    assert "max_pixels" in str(error), (given, error)
                    continue
                assert height >= 28 and width >= 28
