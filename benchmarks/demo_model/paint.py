"""Colors, canvases and single shapes for `draw.py`."""

from __future__ import annotations

import colorsys
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "gray")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

# Ranges of hue in degrees, saturation and value of each color word.
_HSV = {
    "red": ((-8, 8), (0.75, 1.0), (0.6, 1.0)),
    "green": ((95, 150), (0.6, 1.0), (0.38, 1.0)),
    "blue": ((208, 245), (0.7, 1.0), (0.5, 1.0)),
    "yellow": ((49, 62), (0.7, 1.0), (0.85, 1.0)),
    "orange": ((22, 40), (0.75, 1.0), (0.85, 1.0)),
    "purple": ((268, 302), (0.5, 1.0), (0.42, 0.95)),
}
_NAMED = {
    "red": ((255, 0, 0), (220, 20, 60), (200, 0, 0)),
    "green": ((0, 128, 0), (0, 255, 0), (34, 139, 34), (0, 160, 0), (0, 200, 0)),
    "blue": ((0, 0, 255), (30, 60, 220), (30, 144, 255), (0, 0, 200)),
    "yellow": ((255, 255, 0), (255, 215, 0), (240, 220, 0)),
    "orange": ((255, 165, 0), (255, 140, 0), (255, 128, 0)),
    "purple": ((128, 0, 128), (160, 32, 240), (138, 43, 226), (150, 0, 200)),
    "black": ((0, 0, 0), (20, 20, 20)),
    "gray": ((128, 128, 128), (105, 105, 105), (150, 150, 150), (160, 160, 160)),
}

Color = tuple[int, int, int]


def color_of(rng: np.random.Generator, name: str) -> Color:
    """Return a random shade of the named color."""
    if rng.random() < 0.35:
        named = _NAMED[name]
        return named[rng.integers(len(named))]
    if name == "black":
        level = int(rng.integers(0, 35))
        return level, level, level
    if name == "gray":
        level = int(rng.integers(95, 172))
        tint = rng.integers(-4, 5, 3)
        return tuple(int(level + t) for t in tint)  # type: ignore[return-value]
    hue, saturation, value = (rng.uniform(*bounds) for bounds in _HSV[name])
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))  # type: ignore[return-value]


def background(rng: np.random.Generator) -> Color:
    if rng.random() < 0.45:
        return (255, 255, 255)
    level = rng.uniform(0.87, 1.0)
    tint = rng.uniform(0.93, 1.0, 3) if rng.random() < 0.6 else np.ones(3)
    return tuple(int(255 * level * t) for t in tint)  # type: ignore[return-value]


def new_canvas(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, background(rng))
    if rng.random() < 0.1:  # soft light from one side
        ramp = np.linspace(-12, 0, size[0] if rng.random() < 0.5 else size[1])
        shade = ramp[None, :, None] if len(ramp) == size[0] else ramp[:, None, None]
        image = Image.fromarray((np.asarray(image) + shade).clip(0, 255).astype(np.uint8))
    return image


def finish(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Apply JPEG compression or noise to some pictures."""
    chance = rng.random()
    if chance < 0.12:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(60, 96)))
        return Image.open(buffer).convert("RGB")
    if chance < 0.2:
        noise = rng.normal(0, rng.uniform(1, 5), (*image.size[::-1], 3))
        return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image


@dataclass(frozen=True)
class Style:
    """Attributes of a drawn shape other than color, position and size."""

    shape: str
    angle: float  # radians
    ratio: float  # relative size of a star's inner radius, a cross's arm or a ring's hole
    smooth: int  # 1: hard edges; 3 or 4: smooth edges (supersampling)
    outline: bool


def choose_style(rng: np.random.Generator, shape: str) -> Style:
    turn = math.radians(rng.uniform(-10, 10)) if rng.random() < 0.4 else 0.0
    if shape == "triangle" and rng.random() < 0.15:
        turn += math.radians(float(rng.choice([90, 180, 270])))
    if shape == "cross" and rng.random() < 0.08:
        turn += math.pi / 4
    low, high = {"star": (0.34, 0.56), "cross": (0.2, 0.46), "ring": (0.45, 0.85)}.get(
        shape, (0.0, 1.0)
    )
    smooth = int(rng.choice([1, 1, 3, 4]))
    return Style(shape, turn, rng.uniform(low, high), smooth, bool(rng.random() < 0.1))


def _outline(style: Style) -> list[tuple[float, float]]:
    """Return a polygon's corners in a [-1, 1] box."""
    if style.shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if style.shape == "triangle":
        if style.ratio < 0.5:
            return [(0, -1), (1, 1), (-1, 1)]
        return [(math.sin(a), -math.cos(a)) for a in (0, 2.0944, 4.18879)]
    if style.shape == "star":
        radii = [1.0, style.ratio] * 5
        return [
            (r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5))
            for i, r in enumerate(radii)
        ]
    a = style.ratio
    corner = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
    return corner + [(-x, -y) for x, y in corner]


def paint(image: Image.Image, x: float, y: float, size: float, color: Color, style: Style) -> None:
    """Draw a shape with a bounding box of `size` pixels per side, centered at (x, y)."""
    scale = style.smooth
    left, top = math.floor(x - size / 2 * 1.45), math.floor(y - size / 2 * 1.45)
    side = math.ceil(size * 1.45) + 2
    mask = Image.new("L", (side * scale, side * scale))
    draw = ImageDraw.Draw(mask)
    cx, cy, radius = (x - left) * scale, (y - top) * scale, size / 2 * scale
    if style.shape in ("circle", "ring"):
        draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=255)
        if style.shape == "ring":
            hole = radius * style.ratio
            draw.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=0)
    else:
        sin, cos = math.sin(style.angle), math.cos(style.angle)
        points = [
            (cx + radius * (px * cos - py * sin), cy + radius * (px * sin + py * cos))
            for px, py in _outline(style)
        ]
        draw.polygon(points, fill=255)
    if scale > 1:
        mask = mask.resize((side, side), Image.Resampling.BOX)
    if style.outline:
        grown = Image.new("RGB", (side, side), tuple(c // 2 for c in color))
        image.paste(grown, (left, top), mask.filter(ImageFilter.MaxFilter(3)))
    image.paste(Image.new("RGB", (side, side), color), (left, top), mask)
