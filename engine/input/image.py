"""Images: decoding, upright and without transparency, and qwen-vl-utils' resize rule."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..config import PreprocessConfig
from .errors import InputError
from .media import MediaOptions, Pixels, check_decoded_size, read_source

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
BACKGROUND = (255, 255, 255)  # behind transparent pixels
MAX_RATIO = 200


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, field: str
) -> tuple[int, int]:
    """Height and width as multiples of `factor`, with an area between the two limits.

    Source: `smart_resize` of qwen-vl-utils. Raises `InputError` for a ratio over 200, and where
    that rule would leave a side of no pixels.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise InputError(
            field, f"{width}×{height} pixels: one side is over {MAX_RATIO} times the other; crop it"
        )
    new = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if new[0] * new[1] > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new = [math.floor(side / beta / factor) * factor for side in (height, width)]
    elif new[0] * new[1] < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new = [math.ceil(side * beta / factor) * factor for side in (height, width)]
    if min(new) < factor:
        raise InputError(
            field,
            f"{width}×{height} pixels: too narrow for max_pixels={max_pixels}; raise it, or crop",
        )
    return new[0], new[1]


def image_size(
    height: int,
    width: int,
    options: MediaOptions,
    preprocess: PreprocessConfig,
    factor: int,
    field: str,
) -> tuple[int, int]:
    """The size that an image is resized to. Limits of the item go before the server's."""
    if options.resized_height and options.resized_width:
        return exact_size(options.resized_height, options.resized_width, factor, field)
    low = options.min_pixels or min(preprocess.min_pixels, options.max_pixels or MAX_INT)
    high = options.max_pixels or max(preprocess.max_pixels, options.min_pixels or 0)
    return smart_resize(height, width, factor, low, high, field)


MAX_INT = 1 << 62


def exact_size(height: int, width: int, factor: int, field: str) -> tuple[int, int]:
    """The size that a caller asked for, to the next multiples; only the widest limits hold."""
    widest = PreprocessConfig()
    return smart_resize(height, width, factor, widest.min_pixels, widest.max_pixels, field)


def load_image(source: Any, field: str, allow_local_files: bool) -> Image.Image:
    """An upright RGB image. Raises `InputError` for what is not an image."""
    data = read_source(source, field, allow_local_files)
    if isinstance(data, Image.Image):
        check_decoded_size(*data.size, field)
        return _upright(data, field)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise InputError(field, "decodes to too many pixels") from None
        except Exception:  # decoders raise all kinds; their texts may tell of memory
            raise InputError(field, f"not an image that is read ({', '.join(FORMATS)})") from None
        check_decoded_size(*image.size, field)
        return _upright(image, field)


def _upright(image: Image.Image, field: str) -> Image.Image:
    try:
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception:
        raise InputError(field, "the image is broken: it cannot be decoded whole") from None


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
