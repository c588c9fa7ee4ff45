"""Convert all of Pillow's modes to RGB, without transparency."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .samples import GraySamples, covered_part, deep_transparency, gray_samples

BACKGROUND = (255, 255, 255)  # color for transparent pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert an image to RGB, with transparency flattened onto white.

    Like Pillow's `convert`, except that samples of more than 8 bits are scaled, not clipped to 255.
    """
    box = covered_part(image)
    if box is None:
        return _to_rgb(image)
    whole = Image.new("RGB", image.size, BACKGROUND)
    whole.paste(_to_rgb(image).crop(box), box)
    return whole


def _to_rgb(image: Image.Image) -> Image.Image:
    samples = gray_samples(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep(image, samples)
    if samples and samples.is_signed and samples.bits == 8:
        signed = np.asarray(image).view(np.int8)
        return Image.fromarray(signed.clip(0).astype(np.uint8)).convert("RGB")
    is_clear = deep_transparency(image)
    if is_clear is not None:
        pixels = np.array(image)
        pixels[is_clear] = BACKGROUND
        return Image.fromarray(pixels)
    if image.mode == "La":  # Pillow cannot convert it to RGB directly
        image = image.convert("LA")
    if image.has_transparency_data:
        return _on_background(image)
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image


def _on_background(image: Image.Image) -> Image.Image:
    whole = image.convert("RGBA")
    alpha = whole.getchannel("A")
    # Many writers leave the alpha channel of a BMP zero; like browsers, treat it as opaque.
    if image.format == "BMP" and not alpha.getbbox():
        return whole.convert("RGB")
    flat = Image.new("RGB", image.size, BACKGROUND)
    flat.paste(whole, mask=alpha)
    return flat


def _from_deep(image: Image.Image, samples: GraySamples | None) -> Image.Image:
    """Convert gray of 12 to 32 bits or floats to RGB; keep the highest 8 bits.

    Modes I and F do not define a maximum; it is taken as the first of 1 (mode F), 255, 65,535 and
    2³¹ - 1 (unsigned: 2³² - 1) that is not below the largest value. Negative values and NaN become
    black.
    """
    values = np.asarray(image)
    if samples and samples.bits == 32 and image.mode == "I" and not samples.is_signed:
        values = values.view(np.uint32)
    if image.mode.startswith("I;16"):
        gray = (values >> (samples.bits - 8 if samples else 8)).astype(np.uint8)
    else:
        gray = _high_bits(values, image.mode)
    if samples and samples.white_is_zero:
        gray = 255 - gray
        gray[values != values] = 0
    clear = image.info.get("transparency")  # the transparent gray value of a 16-bit PNG
    if isinstance(clear, int):
        gray[values == clear] = BACKGROUND[0]
    return Image.fromarray(gray).convert("RGB")


def _high_bits(values: np.ndarray, mode: str) -> np.ndarray:
    known = np.nan_to_num(values.astype(np.float64 if mode == "I" else np.float32), nan=0.0)
    top = float(known.max(initial=0.0))
    if mode == "F" and top <= 1:
        known = np.rint(known.clip(0) * 255)
    elif top > 255:
        known /= 1 << 8 if top <= 65535 else 1 << (24 if values.dtype == np.uint32 else 23)
    return known.clip(0, 255).astype(np.uint8)
