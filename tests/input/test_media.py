"""Where images and videos come from, and what is refused."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from octavo.benchmarks.media.cases import SHAPE, encoded, noise
from octavo.engine.config.engine_config import PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import InputError
from octavo.engine.media.decode.opening import open_here
from octavo.engine.media.decode.reader import Pixels
from octavo.engine.media.item import make_unit, media_hash
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.source import MediaAccess, open_source
from octavo.engine.media.task import MediaTask

DEFAULTS = PreprocessConfig(video_min_pixels=28 * 28 * 4)


NOTHING = MediaAccess(roots=())


def load(source: Any, access: MediaAccess | None = None) -> Pixels:
    """The picture at its own size."""
    limits = MediaLimits()
    file = open_source(source, access or MediaAccess(), "image", MediaTask(limits))
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
        ("a\x00b", "is not a valid path"),
        ("http://example.com/a.png", "--allow-media-domains"),
        ("HTTPS://example.com/a.png", "--allow-media-domains"),
        ("data:image/png;base64,@@@", "base64"),
        ("data:image/png,abc", "not a supported image"),
        ("data:image/png;base64,", "no bytes"),
        (b"", "no bytes"),
        (b"no picture", "not a supported image"),
        (encoded(noise())[:200], "corrupt|not a supported image"),
        (5, "int: must be a path"),
        (Image.new("RGB", (0, 5)), "no size"),
        (Image.new("RGB", (1, 201)), None),
    ],
)
def test_what_is_no_image_is_rejected_clearly(source: Any, words: str | None) -> None:
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


@pytest.mark.lesson("L05")
def test_media_hash() -> None:
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


@pytest.mark.lesson("L09")
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"max_pixel": 5}, "max_pixel.*not an option"),
        ({"fps": 2}, "not an option"),
        ({"min_pixels": 0}, "greater than 0"),
        ({"min_pixels": -4}, "greater than 0"),
        ({"min_pixels": 2.5}, "an integer"),
        ({"min_pixels": True}, "an integer"),
        ({"min_pixels": "100"}, "an integer"),
        ({"max_pixels": float("nan")}, "an integer"),
        ({"max_pixels": 10**400}, "at most"),
        ({"max_pixels": 10**5000}, "at most"),
        ({"max_pixels": 1 << 60}, "at most"),
        ({"min_pixels": 9000, "max_pixels": 4000}, "greater than max_pixels"),
        ({"resized_height": 28}, "pass both"),
    ],
)
def test_pixels_ignored_bad_options_are_rejected(part: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MediaOptions.from_part({"type": "image", "image": "x", **part}, "image", "part")


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
