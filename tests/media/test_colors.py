"""Every mode, depth and transparency that an image may have, as RGB."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from octavo.benchmarks.media.cases import encoded, noise
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.media.decode.image import ImageFile
from octavo.engine.media.decode.reader import Pixels
from octavo.engine.media.source import MediaAccess, open_source
from octavo.engine.media.task import MediaTask


def load(source: Any) -> Pixels:
    """The picture at its own size."""
    file = open_source(source, MediaAccess(roots=()), "image", MediaTask(MediaLimits()))
    with ImageFile(file, MediaLimits(), "image") as reader:
        size = reader.header
        return next(iter(reader.frames([0], size.height, size.width))).pixels


def in_palette(entry: int) -> Image.Image:
    image = Image.new("P", (8, 8), entry)
    image.putpalette([0, 0, 255] * 256)
    return image


CLEAR: dict[str, Callable[[], Any]] = {
    "RGBA": lambda: encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))),
    "LA": lambda: encoded(Image.new("LA", (8, 8), (9, 0))),
    "palette": lambda: encoded(in_palette(3), transparency=3),
    "palette of alphas": lambda: encoded(in_palette(1), transparency=b"\xff\0"),
    "gray": lambda: encoded(Image.new("L", (8, 8), 7), transparency=7),
    "1 bit": lambda: encoded(Image.new("1", (8, 8), 0), transparency=0),
    "RGB": lambda: encoded(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)),
    "16 bits": lambda: encoded(Image.new("I;16", (8, 8), 700), transparency=700),
    "GIF": lambda: encoded(in_palette(3), "GIF", transparency=3),
    "WebP": lambda: encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "WEBP", lossless=True),
    "TIFF": lambda: encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "TIFF"),
    "PA": lambda: Image.new("PA", (8, 8), (3, 0)),
    "La": lambda: Image.new("La", (8, 8), (0, 0)),
    "RGBa": lambda: Image.new("RGBa", (8, 8), (0, 0, 0, 0)),
}


@pytest.mark.lesson("L18")
@pytest.mark.parametrize("name", CLEAR)
def test_exif_alpha_what_is_clear_is_white(name: str) -> None:
    loaded = load(CLEAR[name]())
    assert loaded.shape == (8, 8, 3) and loaded.min() == 255


@pytest.mark.lesson("L18")
@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGBA", (200, 100, 0, 128), (227, 177, 127)),  # pixel * 128 / 255 + 127
        ("RGBa", (100, 50, 0, 128), (227, 177, 127)),  # multiplied by its alpha already
        ("LA", (100, 128), (177, 177, 177)),
        ("La", (50, 128), (177, 177, 177)),
    ],
)
def test_exif_alpha_what_is_half_clear_is_mixed_with_white(
    mode: str, pixel: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert np.abs(load(Image.new(mode, (3, 2), pixel)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "RGBX"])
@pytest.mark.parametrize("form", [None, "TIFF"])  # TIFF has all of these
def test_modes_become_rgb_as_pillow_has_them(mode: str, form: str | None) -> None:
    image = noise()
    image = Image.merge("LAB", image.split()) if mode == "LAB" else image.convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(load(encoded(image, form) if form else image), expected)


def test_a_cmyk_jpeg_is_not_its_negative() -> None:
    """Adobe writes ink as its opposite."""
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(load(encoded(ink, "JPEG")).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("form", ["PNG", "TIFF", None])
def test_16_bits_become_their_upper_8(form: str | None) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    image = Image.fromarray(values)
    loaded = load(encoded(image, form) if form else image)
    np.testing.assert_array_equal(loaded, np.repeat((values // 256)[..., None], 3, -1))


def test_16_bits_of_either_order_are_the_same() -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    big = Image.frombytes("I;16B", (64, 64), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(load(big)[..., 0], values // 256)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int32, [0, 7, 255], [0, 7, 255]),
        (np.int32, [-5, 256, 65535], [0, 1, 255]),
        (np.int32, [0, 1 << 23, 2**31 - 1], [0, 1, 255]),
        (np.float32, [-1, 0.5, 1], [0, 128, 255]),
        (np.float32, [0, 7.9, 255], [0, 7, 255]),
        (np.float32, [float("nan"), 1, 2], [0, 1, 2]),
        (np.float32, [float("nan"), 300, 65535], [0, 1, 255]),
        (np.float32, [float("-inf"), 0, float("inf")], [0, 0, 255]),
    ],
)
def test_the_range_of_deep_modes_is_the_first_that_holds_them(
    dtype: Any, values: list[float], expected: list[int]
) -> None:
    array = np.tile(np.array([values], dtype), (2, 1))
    for source in (Image.fromarray(array), encoded(Image.fromarray(array), "TIFF")):
        assert load(source)[1, :, 1].tolist() == expected


def test_hsv_and_a_lone_pixel() -> None:
    """HSV comes as a PIL image alone."""
    image = noise().convert("HSV")
    np.testing.assert_array_equal(load(image), np.asarray(image.convert("RGB")))
    assert load(Image.new("F", (1, 1), 0.5))[0, 0].tolist() == [128, 128, 128]
