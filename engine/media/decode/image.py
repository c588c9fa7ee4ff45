"""Image files and PIL images: decoded upright, without transparency, resized."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Self

import numpy as np
from PIL import Image, ImageCms, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401
from PIL.JpegImagePlugin import JpegImageFile

from ...config.media_limits import MediaLimits
from ...errors import InputError
from .reader import Frame, MediaHeader, Pixels
from .resample import resize_frame
from .rgb import to_rgb
from .samples import correct, describe_unread

BROKEN = "the image is broken: it cannot be decoded whole"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height change places
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A JPEG is decoded at half its size where that is still 4 times the target and its quantization is
# fine (quality 90 and better). Both are needed for a mean error within 2 levels: noise is off by
# 4.5 where half the size is 2 times the target and by 2.9 where it is 3 times; text on white of
# quality 75 is off by 2.6 and more at every size, since the whole decode clips what rings over
# white; and at a quarter of the size coloured text is off by over 2 up to quality 91.
REDUCED, REDUCED_MARGIN, FINE = 2, 4, 12.0

BAND, LARGE = 128, 4_000_000  # rows that are copied at once; pixels of an image that is worth it

PNG_CHUNKS = 1 << 16  # looked at; a PNG of more is decoded to find its orientation
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
PNG_TURNS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may tell of one

# With the imports above, all that Pillow needs for FORMATS: it neither looks for other formats'
# plugins nor reads a module later on, where a process may no longer open files.
Image.preinit()

# Pillow's remarks on odd files are no business of the server's log. Not `catch_warnings`, which
# threads must not use at once.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, module="PIL")
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class ImageFile:
    """An image file, or a PIL image: a `MediaReader` of one frame, the first. It closes the file.

    Between its header and its frame it holds nothing but the file: a request has many images.
    """

    def __init__(
        self,
        file: BinaryIO | Image.Image,
        limits: MediaLimits,
        field: str,
        is_frame: bool = False,
    ) -> None:
        """Reads the header. `is_frame`: of a video, whose frames are resized in another way.
        Raises `InputError`."""
        self._file, self._limits, self._field = file, limits, field
        self._is_frame = is_frame
        image = self._open()
        width, height = image.size
        limits.check_size(width, height, field)
        self._turn = self._orientation(image)
        self.header = MediaHeader(*((width, height) if self._turn >= 5 else (height, width)))

    def _open(self) -> Image.Image:
        if isinstance(self._file, Image.Image):
            correct(self._file)
            return self._file
        try:
            self._file.seek(0)
            image = Image.open(self._file, formats=FORMATS)
            correct(image)
            return image
        except Image.DecompressionBombError:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow's own limit, here and not in `serve`
            if most >= self._limits.max_media_pixels:
                self._limits.refuse("max_media_pixels", self._field, f"over {most} pixels")
            text = f"over {most} pixels; raise PIL.Image.MAX_IMAGE_PIXELS"
            raise InputError(self._field, text) from None
        except Exception:  # decoders raise all kinds; their texts may tell of memory
            text = f"not an image that is read ({', '.join(FORMATS)})"
            if what := describe_unread(self._file):
                text = f"{what}, is broken or not read; save it as PNG"
            raise InputError(self._field, text) from None

    def _orientation(self, image: Image.Image) -> int:
        """1 to 8, by EXIF or XMP; 1 where neither can be read, as viewers have it."""
        if image.format == "TIFF":
            return 1  # Pillow turns it as it decodes it, and its size beforehand
        file: Any = getattr(image, "fp", None) if getattr(image, "tile", None) else None
        try:
            if image.format != "PNG" or file is None:
                turn = image.getexif().get(ORIENTATION, 1)
            elif _has_late_turn(file):
                turn = self._open().getexif().get(ORIENTATION, 1)
            else:  # a PNG's own `getexif` decodes its pixels, to look behind them
                turn = Image.Image.getexif(image).get(ORIENTATION, 1)
        except Exception:
            return 1
        return turn if turn in TURNS else 1

    def times(self, indices: Sequence[int]) -> list[float]:
        return [0.0 for _ in indices]

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        try:
            pixels = self._decode(height, width)
        except Exception:
            raise InputError(self._field, BROKEN) from None
        yield Frame(0, pixels)

    def _decode(self, height: int, width: int) -> Pixels:
        image = self._open()
        size = (height, width) if self._turn >= 5 else (width, height)  # before it is turned
        if not self._is_frame and image is not self._file and (box := _reduce(image, size)):
            image = to_rgb(image).resize(size, Image.Resampling.BICUBIC, box)
        image = to_rgb(image)
        if self._turn in TURNS:
            image = image.transpose(TURNS[self._turn])
        if self._is_frame:
            return resize_frame(np.asarray(image), height, width)
        image = _resized(image, height, width)  # the whole one goes before pixels are copied
        return _pixels(image)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if not isinstance(self._file, Image.Image):
            self._file.close()


def _has_late_turn(file: BinaryIO) -> bool:
    """Whether a PNG has something that may tell its orientation behind its pixels."""
    place, is_late = 8, False
    for _ in range(PNG_CHUNKS):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head.endswith(b"IEND"):
            return False
        length, kind = struct.unpack(">I4s", head)
        is_late = is_late or kind == b"IDAT"
        if is_late and kind == b"eXIf":
            return True
        if is_late and kind in PNG_TEXTS and file.read(22).startswith(PNG_TURNS):
            return True
        place += 12 + length
    return True


def _reduce(image: Image.Image, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Sets a JPEG to be decoded at half its size where nobody will see that.

    Returns the box of the smaller image that holds the whole picture.
    """
    if not isinstance(image, JpegImageFile) or not image.quantization:
        return None
    least = REDUCED * REDUCED_MARGIN
    if image.width < least * size[0] or image.height < least * size[1]:
        return None
    if sum(image.quantization[min(image.quantization)]) > FINE * 64:
        return None
    drafted = image.draft(None, (image.width // REDUCED, image.height // REDUCED))
    return drafted[1] if drafted else None


def resize(image: Image.Image, height: int, width: int) -> Pixels:
    """uint8 [height, width, 3], bicubic, as transformers' PIL processor resizes."""
    return _pixels(_resized(image, height, width))


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _pixels(image: Image.Image) -> Pixels:
    """As `np.asarray`; a large image in a third of its time, by bands that stay in the cache."""
    width, height = image.size
    if width * height < LARGE:
        return np.asarray(image)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, BAND):
        bottom = min(top + BAND, height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels
