"""Pixels of image files of every depth, order and transparency, against arithmetic on their
samples. Files are written by hand: few encoders write these, and none writes all."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from octavo.benchmarks.media.files import GRAY, GRAY_ALPHA, PALETTE, RGB, RGB_ALPHA, bmp, png, tiff
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import InputError
from octavo.engine.media.decode.image import ImageFile

Pixels = npt.NDArray[np.int64]
SIDE = 16


def load(data: Any) -> Pixels:
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    with ImageFile(source, MediaLimits(), "image") as reader:
        size = reader.header
        return next(iter(reader.frames([0], size.height, size.width))).pixels.astype(int)


def check(data: bytes, expected: npt.NDArray[Any], tolerance: int = 0) -> None:
    """As the file, and as the PIL image of it that a caller opened."""
    for source in (data, Image.open(io.BytesIO(data))):
        assert np.abs(load(source) - expected).max() <= tolerance


def gray(values: npt.NDArray[Any]) -> Pixels:
    return np.repeat(values[..., None], 3, -1).astype(int)


def ramp(depth: int, least: int = 0) -> Pixels:
    """Samples over all of a depth's range."""
    most = least + (1 << depth) - 1
    return np.linspace(least, most, SIDE * SIDE).astype(np.int64).reshape(SIDE, SIDE)


def random(depth: int, channels: int) -> Pixels:
    rng = np.random.default_rng(depth + channels)
    return rng.integers(0, 1 << depth, (SIDE, SIDE, channels))


def high(samples: npt.NDArray[Any], depth: int) -> npt.NDArray[Any]:
    """The upper 8 bits, or fewer bits spread over 0 to 255."""
    return samples >> (depth - 8) if depth >= 8 else samples * 255 // ((1 << depth) - 1)


def on_white(color: npt.NDArray[Any], alpha: npt.NDArray[Any]) -> Pixels:
    """Of shares from 0 to 1."""
    return np.rint(255 * (color * alpha[..., None] + 1 - alpha[..., None])).astype(int)


# PNG: the specification's 11.3.2.1 (tRNS) and 13.12 (sample depth)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_gray_of_a_png_is_white(depth: int, interlaced: bool) -> None:
    top = (1 << depth) - 1
    samples = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) * (257 if depth == 16 else 1) & top
    for clear in {0, 1, top // 2, top - 1, top}:
        expected = gray(high(samples, depth))
        expected[samples == clear] = 255
        check(png(samples, depth, GRAY, (clear,), interlaced=interlaced), expected)
        if 1 < depth < 16:  # bits beyond the depth mean nothing
            check(png(samples, depth, GRAY, (clear | 0x100,), interlaced=interlaced), expected)
    check(png(samples, depth, GRAY, interlaced=interlaced), gray(high(samples, depth)))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_rgb_of_a_png_is_compared_in_all_bits(depth: int, interlaced: bool) -> None:
    samples = random(depth, 3)
    clear = samples[5, 5]
    samples[2, 2] = samples[3, 3] = samples[4, 4] = clear
    samples[3, 3, 2] ^= 1
    samples[4, 4, 0] ^= 1 << (depth - 1)
    expected = high(samples, depth).copy()
    expected[2, 2] = expected[5, 5] = 255
    check(png(samples, depth, RGB, clear.tolist(), interlaced=interlaced), expected)
    check(png(samples, depth, RGB, interlaced=interlaced), high(samples, depth))


@pytest.mark.parametrize("depth", [8, 16])
def test_alpha_of_a_png(depth: int) -> None:
    top = (1 << depth) - 1
    both = random(depth, 4)
    check(png(both, depth, RGB_ALPHA), on_white(both[..., :3] / top, both[..., 3] / top), 2)
    two = random(depth, 2)
    color = np.repeat(two[..., :1], 3, -1) / top
    check(png(two, depth, GRAY_ALPHA), on_white(color, two[..., 1] / top), 2)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_alpha_of_a_pngs_palette(depth: int) -> None:
    """It may have fewer alphas than colours."""
    count, samples = 1 << depth, np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % (1 << depth)
    rng = np.random.default_rng(depth)
    colors, alphas = rng.integers(0, 256, (count, 3)), rng.integers(0, 256, count)
    palette = colors.astype(np.uint8).tobytes()
    for length in {1, count // 2, count}:
        whole = np.where(np.arange(count) < length, alphas, 255)
        given = bytes(alphas[:length].astype(np.uint8))
        data = png(samples, depth, PALETTE, given, palette)
        check(data, on_white(colors[samples] / 255, whole[samples] / 255), 1)


# TIFF 6.0: BitsPerSample, PhotometricInterpretation, SampleFormat, FillOrder, PlanarConfiguration

GRAYS = (1, 2, 4, 8, 12, 16)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("depth", [*GRAYS, 32])
def test_gray_tiffs(depth: int, photometric: int, order: str, deflate: bool) -> None:
    """12-bit samples were nearly black, 16 bits of white-is-zero inverted."""
    samples = ramp(depth)
    expected = gray(high(samples, depth))
    if photometric == 0:
        expected = 255 - expected
    check(tiff(samples, depth, photometric, order=order, deflate=deflate), expected)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_gray_tiffs_of_reversed_bits(depth: int, photometric: int, deflate: bool) -> None:
    samples = ramp(depth)
    expected = gray(high(samples, depth))
    if photometric == 0:
        expected = 255 - expected
    check(tiff(samples, depth, photometric, fill_order=2, deflate=deflate), expected)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("depth", "photometric"), [(8, 1), (16, 0), (16, 1), (32, 0), (32, 1)])
def test_signed_tiffs_are_black_below_zero(
    depth: int, photometric: int, order: str, deflate: bool
) -> None:
    samples = ramp(depth, least=-(1 << (depth - 1)))
    expected = gray(samples.clip(0) >> {8: 0, 16: 8, 32: 23}[depth])
    if photometric == 0:
        expected = 255 - expected
    check(tiff(samples, depth, photometric, 2, order, deflate=deflate), expected)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_float_tiffs(photometric: int, order: str, deflate: bool) -> None:
    samples = np.linspace(0, 1, SIDE * SIDE).astype(np.float32).reshape(SIDE, SIDE)
    expected = gray(np.rint(samples * 255))
    if photometric == 0:
        expected = 255 - expected
    check(tiff(samples, 32, photometric, 3, order, deflate=deflate), expected)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("depth", [8, 16])
def test_rgb_tiffs_with_and_without_alpha(
    depth: int, order: str, planar: bool, deflate: bool
) -> None:
    """16-bit planes were noise, multiplied alpha in planes was called broken."""
    top = (1 << depth) - 1
    for extra in ((), (0,), (1,), (2,)):
        samples = random(depth, 3 + len(extra))
        if extra == (1,):
            samples[..., :3] = samples[..., :3] * (samples[..., 3:] / top)
        color, expected = samples[..., :3] / top, high(samples[..., :3], depth)
        if extra == (1,):
            expected = np.rint(255 * (color + 1 - samples[..., 3:] / top)).astype(int)
        elif extra == (2,):
            expected = on_white(color, samples[..., 3] / top)
        data = tiff(samples, depth, 2, order=order, extra=extra, planar=planar, deflate=deflate)
        if extra == (0,) and planar and depth == 8 and not deflate:
            with pytest.raises(InputError, match="a TIFF of RGB"):
                load(data)
            continue
        check(data, expected, 3 if extra in ((1,), (2,)) else 0)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("depth", [8, 16])
def test_cmyk_tiffs(depth: int, order: str, planar: bool) -> None:
    samples = random(depth, 4)
    share = samples / ((1 << depth) - 1)
    expected = (255 * (1 - share[..., :3]) * (1 - share[..., 3:])).astype(int)
    check(tiff(samples, depth, 5, order=order, planar=planar), expected, 2)


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_gray_tiffs_with_alpha(extra: int) -> None:
    samples = random(8, 2)
    if extra == 1:
        samples[..., 0] = samples[..., 0] * (samples[..., 1] / 255)
    color, alpha = samples[..., 0] / 255, samples[..., 1] / 255
    expected = {
        0: samples[..., 0],
        1: np.rint(255 * (color + 1 - alpha)),
        2: np.rint(255 * (color * alpha + 1 - alpha)),
    }[extra]
    check(tiff(samples, 8, 1, extra=(extra,)), gray(expected), 2)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_tiffs(depth: int) -> None:
    colors = np.random.default_rng(depth).integers(0, 1 << 16, (1 << depth, 3))
    samples = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % (1 << depth)
    data = tiff(samples, depth, 3, palette=colors.T.reshape(-1).tolist())
    check(data, colors[samples] >> 8)


UNREAD: dict[str, tuple[bytes, str]] = {
    "10 bits": (tiff(ramp(10), 10, 1), "gray, 10 bits, unsigned"),
    "14 bits": (tiff(ramp(14), 14, 0), "white is zero.*14 bits"),
    "24 bits": (tiff(ramp(24), 24, 1), "gray, 24 bits"),
    "16 bits reversed": (tiff(ramp(16), 16, 0, fill_order=2), "gray.*16 bits"),
    "half floats": (tiff(np.ones((4, 4), np.float16), 16, 1, 3), "16 bits, float"),
    "doubles": (tiff(np.ones((4, 4)), 64, 1, 3), "64 bits, float"),
    "float RGB": (tiff(np.ones((4, 4, 3), np.float32), 32, 2, 3), r"RGB, 32\+32\+32 bits, float"),
    "gray and alpha": (tiff(random(16, 2), 16, 1, extra=(2,)), r"gray, 16\+16 bits"),
    "BMP": (bmp(ramp(32), 32, (0x3FF00000, 0xFFC00, 0x3FF)), "a BMP of 32 bits with the masks"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_rejected_by_name(name: str) -> None:
    data, words = UNREAD[name]
    with pytest.raises(InputError, match=f"{words}.*not supported; save it as PNG"):
        load(data)


# BMP

MASKS: list[tuple[int, tuple[int, ...]]] = [
    (16, ()),
    (16, (0xF800, 0x7E0, 0x1F)),
    (16, (0x7C00, 0x3E0, 0x1F)),
    (32, ()),
    (32, (0xFF0000, 0xFF00, 0xFF)),
    (32, (0xFF000000, 0xFF0000, 0xFF00)),
    (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
    (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
]


def share(pixels: npt.NDArray[Any], mask: int) -> npt.NDArray[Any]:
    shift = (mask & -mask).bit_length() - 1
    return ((pixels & mask) >> shift) / (mask >> shift)


@pytest.mark.parametrize(("bits", "masks"), MASKS)
@pytest.mark.parametrize("header_bytes", [40, 56, 108, 124])
def test_bmps_with_masks(bits: int, masks: tuple[int, ...], header_bytes: int) -> None:
    if len(masks) == 4 and header_bytes == 40:  # it has no place for an alpha mask
        return
    pixels = random(bits, 1)[..., 0]
    usual = (0x7C00, 0x3E0, 0x1F) if bits == 16 else (0xFF0000, 0xFF00, 0xFF)
    color = np.stack([share(pixels, mask) for mask in (masks or usual)[:3]], -1)
    alpha = share(pixels, masks[3]) if len(masks) == 4 else np.ones((SIDE, SIDE))
    for rows_down in (False, True):
        check(bmp(pixels, bits, masks, header_bytes, rows_down), on_white(color, alpha), 2)


def test_a_bmp_whose_alpha_is_empty_is_opaque() -> None:
    """As browsers show it: many writers leave the fourth byte at 0."""
    pixels = random(24, 1)[..., 0]
    data = bmp(pixels, 32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000), 124)
    expected = np.stack([pixels >> 16, pixels >> 8 & 255, pixels & 255], -1)
    check(data, expected)


# Formats that Pillow writes itself


def test_a_gif_frame_smaller_than_its_canvas_stands_on_white() -> None:
    small = Image.new("P", (4, 4), 1)
    small.putpalette([0, 0, 0, 200, 0, 0])
    buffer = io.BytesIO()
    small.save(buffer, "GIF", transparency=0)
    data = bytearray(buffer.getvalue())
    data[6:10] = b"\x08\0\x08\0"  # the canvas is 8 × 8, the frame stays 4 × 4
    expected = np.full((8, 8, 3), 255)
    expected[:4, :4] = (200, 0, 0)
    check(bytes(data), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
def test_jpegs_of_every_mode(mode: str) -> None:
    color = (200, 30, 60)
    image = Image.new("RGB", (SIDE, SIDE), color).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=100, subsampling=0)
    check(buffer.getvalue(), np.asarray(image.convert("RGB")).astype(int), 3)
