"""Images: what they are of, whatever the file's format, mode and state."""

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from typing import Any

import numpy as np
import PIL.ImageFile
import pytest
from PIL import Image, ImageDraw, ImageOps

from octavo.benchmarks.media.cases import encoded, noise, photo
from octavo.benchmarks.media.cases import load as load_media
from octavo.benchmarks.media.fuzz import IMAGES, broken_files, whole_file
from octavo.benchmarks.process_memory import anonymous_bytes
from octavo.engine.config.engine_config import PreprocessConfig
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import InputError
from octavo.engine.media.decode.image import ORIENTATION, ImageFile
from octavo.engine.media.decode.reader import Pixels
from octavo.engine.media.decode.rgb import to_rgb
from octavo.engine.media.options import MediaOptions
from octavo.engine.media.source import MediaAccess, open_source
from octavo.engine.media.task import MediaTask

LIMITS = MediaLimits()
SMALL = PreprocessConfig(max_pixels=64 * 784)


def load(source: Any, height: int | None = None, width: int | None = None) -> Pixels:
    """The picture, at its own size if none is given."""
    file = open_source(source, MediaAccess(roots=()), "image", MediaTask(LIMITS))
    with ImageFile(file, LIMITS, "image") as reader:
        size = reader.header
        frames = reader.frames([0], height or size.height, width or size.width)
        return next(iter(frames)).pixels


def differ(one: Any, other: Any) -> float:
    """Levels, on average."""
    return float(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).mean())


def turned(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    return exif


@pytest.mark.lesson("L18")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_alpha_pictures_are_upright(form: str, turn: int) -> None:
    image = photo(64, 32)
    if form == "TIFF":
        data = encoded(image, form, tiffinfo={ORIENTATION: turn})
    else:
        data = encoded(image, form, exif=turned(turn))
    with Image.open(io.BytesIO(data)) as opened:
        upright = ImageOps.exif_transpose(opened)
    size = (56, 84) if turn >= 5 else (84, 56)
    expected = upright.resize(size, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(load(data), np.asarray(upright))
    np.testing.assert_array_equal(load(data, size[1], size[0]), np.asarray(expected))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of chunks after its header; its pixels are RGB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        total = kind + body
        return struct.pack(">I", len(body)) + total + struct.pack(">I", zlib.crc32(total))

    head = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(*each) for each in ((b"IHDR", head), *chunks, (b"IEND", b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


EXIF = turned(6).tobytes().removeprefix(b"Exif\0\0")
RAW = b"exif\n%8d\n%s\n" % (len(EXIF) + 6, (b"Exif\0\0" + EXIF).hex().encode())
XMP = b'<x tiff:Orientation="6"/>'


@pytest.mark.lesson("L18")
@pytest.mark.parametrize(
    "told",
    [
        (b"eXIf", EXIF),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\n" + RAW)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    ],
    ids=["eXIf", "profile", "xmp"],
)
@pytest.mark.parametrize("is_late", [False, True])
def test_exif_alpha_a_png_tells_it_before_or_behind(
    told: tuple[bytes, bytes], is_late: bool
) -> None:
    image = noise(8, 4)
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(image))
    pixels = (b"IDAT", zlib.compress(rows))
    data = png(8, 4, *((pixels, told) if is_late else (told, pixels)))
    np.testing.assert_array_equal(load(data), np.rot90(np.asarray(image), -1))


def test_a_header_decodes_nothing_and_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 open pictures of 1,200×900 would be 830 MB decoded."""
    decoded: list[Image.Image] = []
    load_pixels = PIL.ImageFile.ImageFile.load

    def load(self: PIL.ImageFile.ImageFile) -> Any:
        decoded.append(self)
        return load_pixels(self)

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", load)
    files = [encoded(photo(1200, 900), form) for form in ("JPEG", "PNG", "WEBP", "TIFF", "GIF")]
    readers = [ImageFile(io.BytesIO(data), LIMITS, "image") for data in files]
    assert {(each.header.height, each.header.width) for each in readers} == {(900, 1200)}
    assert not decoded
    for reader in readers:
        assert not any(isinstance(value, Image.Image) for value in vars(reader).values())
        (frame,) = reader.frames([0], 28, 28)
        assert frame.pixels.shape == (28, 28, 3)
    assert len({id(image) for image in decoded}) == len(files)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_many_frames_the_first_is_taken(form: str) -> None:
    stills = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(stills[0], form, save_all=True, append_images=stills[1:], **options)
    assert load(data)[8, 8].tolist() == [255, 0, 0]


@pytest.mark.lesson("L23")
@pytest.mark.parametrize("form", ["ICO", "PPM", "TGA", "JPEG2000", "AVIF", "SGI", "PCX"])
def test_codec_other_formats_are_rejected(form: str) -> None:
    with pytest.raises(InputError, match=r"not a supported image \(JPEG, PNG, WEBP, GIF"):
        load(encoded(noise(), form))


OPENED = """
import io, sys
import octavo.engine.media.decode.image as image
from octavo.engine.errors import InputError
from octavo.engine.config.media_limits import MediaLimits
before = set(sys.modules)
for text in sys.stdin:
    try:
        reader = image.ImageFile(io.BytesIO(bytes.fromhex(text)), MediaLimits(), "image")
        list(reader.frames([0], 28, 28))
    except InputError:
        pass
print(sorted(set(sys.modules) - before))
"""


@pytest.mark.lesson("L23")
def test_codec_no_module_is_loaded_for_a_file() -> None:
    """No plugin of another format, and nothing that a closed process could not read."""
    files = [whole_file(form) for form in IMAGES] + [data for _, data in broken_files(5, 60)]
    lab = encoded(Image.merge("LAB", noise().split()), "TIFF")
    text = "\n".join(data.hex() for data in [*files, lab])
    command = [sys.executable, "-P", "-c", OPENED]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_large_image_is_copied_whole() -> None:
    image = photo(2051, 2003)
    np.testing.assert_array_equal(load(image), np.asarray(image))


def text_page(size: tuple[int, int]) -> Image.Image:
    page = Image.new("RGB", size, "white")
    pen, rng = ImageDraw.Draw(page), np.random.default_rng(0)
    for top in range(0, size[1], 11):
        line = "".join(map(chr, rng.integers(33, 126, 200)))
        pen.text((0, top), line, fill=tuple(rng.integers(0, 120, 3).tolist()))
    return page


def hard_pictures(size: tuple[int, int] = (1003, 757)) -> dict[str, Image.Image]:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return {
        "photo": photo(*size),
        "noise": noise(*size),
        "bits": noise(*size).point(lambda level: 255 * (level > 127)),
        "squares": Image.fromarray(((x // 7 + y // 7) % 2 * 255).astype(np.uint8)),
        "rings": Image.fromarray((127 + 127 * np.cos((x**2 + y**2) / 500)).astype(np.uint8)),
        "text": text_page(size),
    }


@pytest.mark.lesson("L11")
@pytest.mark.parametrize("quality", [90, 97])
@pytest.mark.parametrize("name", hard_pictures((1, 1)))
def test_cpu_preprocess_half_a_jpeg_is_within_two_levels(name: str, quality: int) -> None:
    data = encoded(hard_pictures()[name], "JPEG", quality=quality, exif=turned(6))
    with Image.open(io.BytesIO(data)) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    for parts in (8, 11, 17, 40):
        size = (upright.width // parts, upright.height // parts)
        expected = upright.resize(size, Image.Resampling.BICUBIC)
        error = differ(load(data, size[1], size[0]), expected)
        assert 0 < error <= 2, parts  # 0: it was not decoded at half its size


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_only_fine_jpegs_for_small_targets_are_decoded_at_half_their_size(mode: str) -> None:
    image = photo(800, 480).convert(mode)
    fine, coarse = (encoded(image, "JPEG", quality=quality) for quality in (90, 85))
    for data, size, is_reduced in ((fine, 100, True), (fine, 104, False), (coarse, 50, False)):
        with Image.open(io.BytesIO(data)) as opened:
            whole = opened.convert("RGB").resize((size, 56), Image.Resampling.BICUBIC)
        assert (differ(load(data, 56, size), whole) > 0) is is_reduced


def test_a_callers_image_is_left_as_it_was() -> None:
    image = Image.open(io.BytesIO(encoded(photo(800, 480), "JPEG", quality=95)))
    load(image, 28, 28)
    assert image.size == (800, 480)
    np.testing.assert_array_equal(load(image), np.asarray(to_rgb(image)))


@pytest.mark.lesson("L22")
@pytest.mark.parametrize("size", [(20_000, 20_000), (65_000, 65_000), (12_000, 10_001)])
def test_bombs_are_rejected_by_their_size(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="--max-media-pixels"):
        load(png(*size, (b"IDAT", zlib.compress(b""))))


@pytest.mark.lesson("L10")
def test_extreme_images_every_size_is_taken_or_rejected() -> None:
    rng, bounded = np.random.default_rng(0), PreprocessConfig(max_pixels=512 * 784)
    sizes = [(1, 1), (20_000, 1), (1, 20_000), (200, 1), (201, 1), (28, 26), (332, 27)]
    sizes += [tuple(map(int, np.exp(rng.uniform(0, np.log(20_000), 2)))) for _ in range(60)]
    for width, height in sizes:
        if width * height > 4_000_000:
            continue
        image = Image.new("RGB", (width, height), (9, 8, 7))
        if max(width, height) > 200 * min(width, height):
            with pytest.raises(InputError, match=f"{width}×{height} pixels: .* over 200 times"):
                load_media("image", image, preprocess=bounded)
            continue
        item, pixels = load_media("image", image, preprocess=bounded)
        _, tall, wide, _ = pixels.shape
        assert tall % 28 == wide % 28 == 0 and 4 * 784 <= tall * wide <= bounded.max_pixels
        assert (pixels == (9, 8, 7)).all() and item.info.num_tokens == tall * wide // 784


# What a refusal must not tell: addresses, paths, names of functions and libraries.
SECRETS = re.compile(r"0x[0-9a-f]|/|Error\b|errno|PIL|libtiff|libjpeg|object at|buffer", re.I)
FUZZ_LIMITS = MediaLimits(max_media_pixels=1_000_000)


def fuzz(seed: int, count: int) -> Counter[str]:
    """Loads damaged images; only an `InputError` may come of them. Counts what did."""
    found: Counter[str] = Counter()
    for form, data in broken_files(seed, count, tuple(IMAGES)):
        try:
            _, pixels = load_media("image", data, preprocess=SMALL, limits=FUZZ_LIMITS)
        except InputError as error:
            assert error.field == "image" and not SECRETS.search(str(error)), str(error)
            found["refused"] += 1
        else:
            assert pixels.shape[0] == 1 and pixels.shape[3] == 3, form
            found["read"] += 1
    return found


@pytest.mark.lesson("L10")
@pytest.mark.parametrize("form", IMAGES)
def test_extreme_images_a_file_cut_off_is_never_half_a_picture(form: str) -> None:
    data = whole_file(form)
    whole = load(data)
    refused = 0
    for share in (0.02, 0.1, 0.3, 0.6, 0.9, 0.99, 1):
        try:  # a moving picture's later frames, or a file's end mark, may be all that lacks
            assert differ(load(data[: int(len(data) * share) - 1]), whole) == 0
        except InputError as error:
            assert re.search("corrupt|not a supported image", str(error))
            refused += 1
    assert refused >= (2 if form == "gif moving" else 5)


@pytest.mark.lesson("L23")
def test_codec_damaged_images_are_rejected_or_read() -> None:
    found = fuzz(0, 330)
    assert found["refused"] > 100 and found["read"] > 50


@pytest.mark.lesson("L23")
@pytest.mark.slow
def test_codec_10_000_damaged_images() -> None:
    """And none leaves memory behind."""
    assert fuzz(1, 2000)["refused"] > 800
    before = anonymous_bytes(os.getpid())
    assert fuzz(2, 8000)["refused"] > 3200
    assert anonymous_bytes(os.getpid()) - before < 20 << 20


def test_options_shape_an_image() -> None:
    options = MediaOptions(resized_height=56, resized_width=84)
    assert load_media("image", encoded(noise()), options)[1].shape == (1, 56, 84, 3)
