"""Image files and PIL images: decoded upright, without transparency, resized."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Self

import numpy as np
from PIL import Image, ImageOps

from ..input_error import InputError
from .limits import MediaLimits
from .reader import Frame, MediaHeader, Pixels

BROKEN = "the image is broken: it cannot be decoded whole"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
BACKGROUND = (255, 255, 255)  # behind transparent pixels
ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height change places


class ImageFile:
    """An image file, or a PIL image: a `MediaReader` of one frame. It closes the file."""

    def __init__(self, file: BinaryIO | Image.Image, limits: MediaLimits, field: str) -> None:
        """Reads the header. Raises `InputError`."""
        self._field = field
        self._file = None if isinstance(file, Image.Image) else file
        self._image = file if isinstance(file, Image.Image) else _open(file, field)
        width, height = self._image.size
        limits.check_size(width, height, field)
        self.header = MediaHeader(*((width, height) if self._is_turned() else (height, width)))

    def _is_turned(self) -> bool:
        try:  # a PNG may have it behind its pixels, which are decoded to find it
            turn = self._image.getexif().get(ORIENTATION, 1)
        except Exception:  # decoders raise all kinds; their texts may tell of memory
            raise InputError(self._field, BROKEN) from None
        return isinstance(turn, int) and turn >= 5

    def times(self, indices: Sequence[int]) -> list[float]:
        return [0.0 for _ in indices]

    def frames(self, indices: Sequence[int], height: int, width: int) -> Iterator[Frame]:
        try:
            upright = to_rgb(ImageOps.exif_transpose(self._image))
        except Exception:
            raise InputError(self._field, BROKEN) from None
        yield Frame(0, resize(upright, height, width))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()


def _open(file: BinaryIO, field: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise InputError(field, "decodes to too many pixels") from None
        except Exception:
            raise InputError(field, f"not an image that is read ({', '.join(FORMATS)})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparency flattened onto white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        flat = Image.new("RGB", image.size, BACKGROUND)
        flat.paste(whole, mask=whole.getchannel("A"))
        return flat
    return image.convert("RGB")


def resize(image: Image.Image, height: int, width: int) -> Pixels:
    """uint8 [height, width, 3], bicubic, as transformers' PIL processor resizes."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)
