"""Pillow's modes as RGB: of all depths, without transparency."""

from __future__ import annotations

import numpy as np
from PIL import Image

BACKGROUND = (255, 255, 255)  # behind transparent pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, decoded, with transparency flattened onto white.

    As Pillow's `convert`, but for more than 8 bits, where that cuts all over 255 to white.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep(image)
    if image.mode == "La":  # has no way to RGB of its own
        image = image.convert("LA")
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        flat = Image.new("RGB", image.size, BACKGROUND)
        flat.paste(whole, mask=whole.getchannel("A"))
        return flat
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image


def _from_deep(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits or of floats, as RGB of the highest 8 bits.

    Modes I and F do not say how far they go: to 1 (F alone), 255, 65,535 or 2³¹ - 1, whichever is
    the first to hold the largest value. What is under 0 or not a number is black.
    """
    values = np.asarray(image)
    gray = _high_bits(values, image.mode)
    clear = image.info.get("transparency")  # the gray that is transparent, in 16-bit PNGs
    if isinstance(clear, int):
        gray[values == clear] = BACKGROUND[0]
    return Image.fromarray(gray).convert("RGB")


def _high_bits(values: np.ndarray, mode: str) -> np.ndarray:
    if mode.startswith("I;16"):
        return (values >> 8).astype(np.uint8)
    known = np.nan_to_num(values.astype(np.float32), nan=0.0)
    top = float(known.max(initial=0.0))
    if mode == "F" and top <= 1:
        known = np.rint(known * 255)
    elif top > 255:
        known /= 1 << 8 if top <= 65535 else 1 << 23
    return known.clip(0, 255).astype(np.uint8)
