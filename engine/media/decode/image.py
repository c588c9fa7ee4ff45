"""Decode image files and PIL images: apply orientation, flatten transparency, resize."""

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

BROKEN = "the image is corrupt: it cannot be decoded completely"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112  # EXIF tag; values from 5 on swap width and height
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A JPEG is decoded at half its size if that is at least 4 times the target size and its
# quantization is fine (quality 90 or better). Both conditions are needed for a mean error within
# 2 levels. The error of noise is 4.5 if half the size is 2 times the target, and 2.9 if it is
# 3 times. The error of text on white at quality 75 is at least 2.6 at every size, because decoding
# at full size clips ringing above white. At a quarter of the size, the error of coloured text is
# over 2 up to quality 91.
REDUCED, REDUCED_MARGIN, FINE = 2, 4, 12.0

BAND, LARGE = 128, 4_000_000  # rows copied at a time, in images of at least LARGE pixels

PNG_CHUNKS = 1 << 16  # chunks to scan; a PNG with more is decoded to find its orientation
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
PNG_TURNS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # keywords; may have orientation

# With the imports above, this loads all that Pillow needs for FORMATS. Otherwise Pillow would
# import plugins later, when a sandboxed process can no longer open files.
Image.preinit()

# Keep Pillow's warnings about unusual files out of the server's log. `catch_warnings` would not
# be thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, module="PIL")
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class ImageFile:
    """`MediaReader` of the first frame of an image file, or of a PIL image. It closes the file.

    Between reading the header and the frame, it keeps only the file in memory, because a request
    may have many images.
    """

    def __init__(
        self,
        file: BinaryIO | Image.Image,
        limits: MediaLimits,
        field: str,
        is_frame: bool = False,
    ) -> None:
        """Read the header.

        `is_frame`: the image is a frame of a video; frames use another resize algorithm. Raises
        `InputError` if the file is not a supported image or is too large.
        """
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
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow's limit; decoder processes have none
            if most >= self._limits.max_media_pixels:
                self._limits.refuse("max_media_pixels", self._field, f"over {most} pixels")
            text = f"over {most} pixels; raise PIL.Image.MAX_IMAGE_PIXELS"
            raise InputError(self._field, text) from None
        except Exception:  # of any type; its text may reveal memory, so it is not shown
            text = f"not a supported image ({', '.join(FORMATS)})"
            if description := describe_unread(self._file):
                text = f"{description}, is corrupt or not supported; save it as PNG"
            raise InputError(self._field, text) from None

    def _orientation(self, image: Image.Image) -> int:
        """Return the orientation in EXIF or XMP, 1 to 8; 1 if it cannot be read, like viewers."""
        if image.format == "TIFF":
            return 1  # Pillow applies it while decoding, and to the size when opening
        file: Any = getattr(image, "fp", None) if getattr(image, "tile", None) else None
        try:
            if image.format != "PNG" or file is None:
                turn = image.getexif().get(ORIENTATION, 1)
            elif _has_late_turn(file):
                turn = self._open().getexif().get(ORIENTATION, 1)
            else:  # `PngImageFile.getexif` would decode the pixels, to find chunks after them
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
        size = (height, width) if self._turn >= 5 else (width, height)  # before orientation
        if not self._is_frame and image is not self._file and (box := _reduce(image, size)):
            image = to_rgb(image).resize(size, Image.Resampling.BICUBIC, box)
        image = to_rgb(image)
        if self._turn in TURNS:
            image = image.transpose(TURNS[self._turn])
        if self._is_frame:
            return resize_frame(np.asarray(image), height, width)
        # Rebinding `image` frees the full-size image before the pixels are copied.
        image = _resized(image, height, width)
        return _pixels(image)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if not isinstance(self._file, Image.Image):
            self._file.close()


def _has_late_turn(file: BinaryIO) -> bool:
    """Return whether a PNG may have its orientation in a chunk after its pixels."""
    position, is_late = 8, False
    for _ in range(PNG_CHUNKS):
        file.seek(position)
        head = file.read(8)
        if len(head) < 8 or head.endswith(b"IEND"):
            return False
        length, kind = struct.unpack(">I4s", head)
        is_late = is_late or kind == b"IDAT"
        if is_late and kind == b"eXIf":
            return True
        if is_late and kind in PNG_TEXTS and file.read(22).startswith(PNG_TURNS):
            return True
        position += 12 + length
    return True


def _reduce(image: Image.Image, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Configure a JPEG to be decoded at half its size if the difference is not visible.

    Returns the box of the reduced image that contains the whole picture; None if not reduced.
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
    """Resize with PIL's bicubic filter, like transformers' PIL processor.

    Returns uint8 [height, width, 3].
    """
    return _pixels(_resized(image, height, width))


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _pixels(image: Image.Image) -> Pixels:
    """Convert to an array; copying a large image in cache-sized bands takes a third of the time."""
    width, height = image.size
    if width * height < LARGE:
        return np.asarray(image)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, BAND):
        bottom = min(top + BAND, height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels
