"""Fix samples of PNG and TIFF files that Pillow decodes contrary to the specifications.

Call `correct` after a file is opened and before it is decoded.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from .reader import Pixels

BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF tags
WHITE_IS_ZERO, SEPARATE_PLANES, UNSIGNED, SIGNED = 0, 2, 1, 2  # values of the last three
PNG_GRAY_TOP = {"L;2": 3, "L;4": 15}  # largest sample, by Pillow's raw mode
DEEP_RGB = "RGB;16B"
PHOTOMETRICS = {0: "gray (white is zero)", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK"}
# Gray TIFF formats that Pillow can unpack but does not list. Keys: (byte order, photometric,
# sample format, fill order, bits, extra samples); values: (mode, raw mode). `to_rgb` inverts
# white-is-zero.
MORE_KINDS = {
    (b"MM", 1, (1,), 1, (12,), ()): ("I;16", "I;12"),
    (b"II", 0, (1,), 1, (12,), ()): ("I;16", "I;12"),
    (b"MM", 0, (1,), 1, (12,), ()): ("I;16", "I;12"),
    (b"MM", 0, (1,), 1, (16,), ()): ("I;16B", "I;16B"),
    (b"II", 0, (2,), 1, (16,), ()): ("I", "I;16S"),
    (b"MM", 0, (2,), 1, (16,), ()): ("I", "I;16BS"),
    (b"II", 0, (1,), 1, (32,), ()): ("I", "I;32S"),
    (b"MM", 0, (1,), 1, (32,), ()): ("I", "I;32BS"),
    (b"MM", 1, (1,), 1, (32,), ()): ("I", "I;32BS"),
    (b"II", 0, (2,), 1, (32,), ()): ("I", "I;32S"),
    (b"MM", 0, (2,), 1, (32,), ()): ("I", "I;32BS"),
}
for _key, _value in MORE_KINDS.items():
    TiffImagePlugin.OPEN_INFO.setdefault(_key, _value)
# libtiff returns samples in this machine's byte order, not the file's.
_NATIVE = "" if sys.byteorder == "little" else "B"
NATIVE = {f"{kind};{bits}B{sign}": f"{kind};{bits}{_NATIVE}{sign}"
          for kind, bits, sign in (("F", 32, "F"), ("I", 32, "S"), ("I", 16, "S"))}  # fmt: skip


@dataclass(frozen=True)
class GraySamples:
    """Sample format of a gray TIFF."""

    bits: int
    is_signed: bool
    white_is_zero: bool


def correct(image: Image.Image) -> None:
    """Make Pillow decode an open file according to its specification."""
    if not getattr(image, "tile", None):  # already decoded
        return
    if image.format == "PNG":
        _scale_transparency(image)
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        _correct_tiff(image)


def _scale_transparency(image: Image.Image) -> None:
    """Scale the transparent gray or color like the samples.

    Pillow scales samples of 2 and 4 bits to 0..255, but not the transparent one. Bits of it beyond
    the file's depth must be ignored.
    """
    clear, depth = image.info.get("transparency"), _raw_mode(image)
    if isinstance(clear, int) and depth in PNG_GRAY_TOP:
        top = PNG_GRAY_TOP[depth]
        image.info["transparency"] = (clear & top) * 255 // top
    elif isinstance(clear, int) and image.mode == "L":
        image.info["transparency"] = clear & 255
    elif isinstance(clear, tuple) and depth == "RGB":
        image.info["transparency"] = tuple(each & 255 for each in clear)


def _raw_mode(image: Any) -> str:
    arguments = image.tile[0][3]
    return arguments if isinstance(arguments, str) else str(arguments[0])


def deep_transparency(image: Image.Image) -> Pixels | None:
    """Return which pixels of a 16-bit RGB PNG are transparent, bool [height, width].

    Returns None for other images and if the image is already decoded. Pillow keeps only the upper
    bytes of samples; decoding again in the other byte order returns the lower ones.
    """
    clear = image.info.get("transparency")
    if image.format != "PNG" or not clear or not getattr(image, "tile", None):
        return None
    if _raw_mode(image) != DEEP_RGB:
        return None
    other: Any = Image.open(image.fp, formats=("PNG",))  # type: ignore[attr-defined]
    other.tile = [other.tile[0]._replace(args="RGB;16L")]
    low = np.asarray(other)
    high = np.asarray(image)
    matches = (low == [each & 255 for each in clear]) & (high == [each >> 8 for each in clear])
    return matches.all(-1)


def covered_part(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the box that the first frame of an undecoded GIF covers; None if it covers all.

    Pillow fills the rest with a color; viewers leave it transparent.
    """
    if image.format != "GIF" or not getattr(image, "tile", None):
        return None
    left, top, right, bottom = image.tile[0][1]  # type: ignore[attr-defined]
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return None if box == (0, 0, *image.size) else box


def _correct_tiff(image: Any) -> None:
    """Use libtiff where Pillow's own decoder is wrong, and fix the byte order of its output."""
    tile = image.tile[0]
    raw_modes = [each.args[0] for each in image.tile]
    if tile.codec_name == "libtiff" and raw_modes[0] in NATIVE:
        image.tile = [tile._replace(args=(NATIVE[raw_modes[0]], *tile.args[1:]))]
    if tile.codec_name != "raw":
        return
    is_planar = image.tag_v2.get(PLANAR, 1) == SEPARATE_PLANES and len(image.getbands()) > 1
    is_deep = image.tag_v2.get(BITS, (1,))[0] == 16
    # Pillow decodes 16-bit planes as 8-bit, and premultiplied alpha in a separate plane wrongly.
    if is_planar and (is_deep or "a" in raw_modes):
        raw_mode = image.mode + ";16N" * is_deep
    elif raw_modes[0] == "L;IR":  # white is zero, bits of each byte reversed
        raw_mode = "L;I"
    else:
        return
    image.use_load_libtiff = True
    arguments = (raw_mode, False, image.tag_v2.offset)
    whole = (0, 0, *image.size)
    image.tile = [ImageFile._Tile("libtiff", whole, 0, arguments)]


def describe_unread(file: BinaryIO) -> str:
    """Describe an unsupported TIFF or BMP file for an error message; empty if unknown."""
    try:
        file.seek(0)
        head = file.read(70)
        if head[:2] == b"BM":
            return _describe_bmp(head)
        return _describe_tiff(file, head) if head[:2] in (b"II", b"MM") else ""
    except Exception:  # a corrupt file
        return ""


def _describe_bmp(head: bytes) -> str:
    size, _, _, _, bits, compression = struct.unpack_from("<IiiHHI", head, 14)
    if compression not in (3, 6):
        return ""
    masks = struct.unpack_from("<4I" if size >= 56 or compression == 6 else "<3I", head, 54)
    return f"a BMP of {bits} bits with the masks {', '.join(map(hex, masks))}"


def _describe_tiff(file: BinaryIO, head: bytes) -> str:
    tags = TiffImagePlugin.ImageFileDirectory_v2(head[:8])
    file.seek(tags.next)
    tags.load(file)
    bits = tuple(tags.get(BITS, (1,)))
    kind = {1: "unsigned", 2: "signed", 3: "float"}.get(tags.get(SAMPLE_FORMAT, (1,))[0], "complex")
    photometric = tags.get(PHOTOMETRIC, 0)
    name = PHOTOMETRICS.get(photometric, f"photometric {photometric}")
    return f"a TIFF of {name}, {'+'.join(map(str, bits[:8]))} bits, {kind}"


def gray_samples(image: Image.Image) -> GraySamples | None:
    """Return the sample format of a TIFF; None for other files."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    tags = image.tag_v2
    return GraySamples(
        bits=tags.get(BITS, (1,))[0],
        is_signed=tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == SIGNED,
        white_is_zero=tags.get(PHOTOMETRIC, 1) == WHITE_IS_ZERO,
    )
