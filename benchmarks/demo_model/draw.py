"""Draw the pictures that the embedded model is asked about, with their correct answers.

Everything is determined by a `numpy.random.Generator`, so a seed reproduces a picture. Fonts are
the system's and Pillow's default.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .paint import COLORS, SHAPES, Color, choose_style, color_of, finish, new_canvas, paint

NUMBER_WORDS = ("one", "two", "three", "four", "five", "six")
DIRECTIONS = ("left", "right", "up", "down")
MIN_SIDE, MAX_SIDE, MAX_RATIO = 56, 448, 4.0


@dataclass(frozen=True)
class Mark:
    """A shape or a digit in a picture, in pixels of its canvas."""

    x: float  # center
    y: float
    width: float  # of the bounding box
    height: float
    color: str = ""
    shape: str = ""
    digit: int = -1


@dataclass(frozen=True)
class Picture:
    image: Image.Image
    marks: tuple[Mark, ...]


def choose_canvas(rng: np.random.Generator) -> tuple[int, int]:
    """Return a width and height of 56 to 448 pixels with an aspect ratio of at most 4."""
    while True:
        width, height = (int(side) for side in rng.integers(MIN_SIDE, MAX_SIDE + 1, 2))
        if max(width, height) <= MAX_RATIO * min(width, height):
            return width, height


def _place(rng: np.random.Generator, canvas: tuple[int, int], size: float) -> tuple[float, float]:
    half = size / 2
    x, y = (rng.uniform(half, side - half) for side in canvas)
    return float(x), float(y)


def draw_shape(
    rng: np.random.Generator, canvas: tuple[int, int], color: str, shape: str
) -> Picture:
    """Draw one shape of 25 to 80 % of the shorter side."""
    image = new_canvas(rng, canvas)
    size = min(canvas) * rng.uniform(0.25, 0.8)
    x, y = _place(rng, canvas, size)
    paint(image, x, y, size, color_of(rng, color), choose_style(rng, shape))
    return Picture(finish(rng, image), (Mark(x, y, size, size, color, shape),))


def draw_count(rng: np.random.Generator, canvas: tuple[int, int], count: int) -> Picture:
    """Draw `count` separate shapes, each 15 to 30 % of the shorter side."""
    image = new_canvas(rng, canvas)
    marks: list[Mark] = []
    same = rng.random() < 0.25
    color, shape = str(rng.choice(COLORS)), str(rng.choice(SHAPES))
    gap = rng.uniform(1.02, 1.25)
    tries = 0
    while len(marks) < count:
        size = min(canvas) * rng.uniform(0.15, 0.3)
        x, y = _place(rng, canvas, size)
        tries += 1
        if tries > 400:
            marks, tries = [], 0
            image = new_canvas(rng, canvas)
        if any(max(abs(x - m.x), abs(y - m.y)) < gap * (size + m.width) / 2 for m in marks):
            continue
        if not same:
            color, shape = str(rng.choice(COLORS)), str(rng.choice(SHAPES))
        paint(image, x, y, size, color_of(rng, color), choose_style(rng, shape))
        marks.append(Mark(x, y, size, size, color, shape))
    return Picture(finish(rng, image), tuple(marks))


@functools.cache
def font_files() -> tuple[str, ...]:
    """Return the system's upright text fonts with Latin digits; empty if none are installed."""
    wanted = (
        "dejavu",
        "liberation",
        "freefont",
        "roboto",
        "noto",
        "opensans",
        "lato",
        "ubuntu",
        "open-sans",
        "crosextra",
        "croscore",
        "urw",
        "inter",
        "hack",
        "fira",
    )
    skip = (
        "italic",
        "oblique",
        "math",
        "symbol",
        "emoji",
        "extralight",
        "thin",
        "hairline",
        "standardsymbols",
        "dingbat",
        "d050",
        "chancery",
        "z003",
        "-it",
        "cjk",
        "condensed",
    )
    found = []
    for path in sorted(Path("/usr/share/fonts").rglob("*.[to]tf")):
        text = str(path).lower()
        if any(w in text for w in wanted) and not any(s in path.name.lower() for s in skip):
            if "noto" in text and path.name.split("-")[0] not in (
                "NotoSans",
                "NotoSerif",
                "NotoMono",
                "NotoSansMono",
                "NotoSansDisplay",
                "NotoSerifDisplay",
            ):
                continue
            found.append(str(path))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def draw_number(
    rng: np.random.Generator, canvas: tuple[int, int], text: str, smallest: int = 18
) -> Picture:
    """Draw upright, dark digits on a light background, at font size `smallest` or larger."""
    image = new_canvas(rng, canvas)
    files = font_files()
    path = "" if rng.random() < 0.25 or not files else files[rng.integers(len(files))]
    largest = smallest
    for size in (20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 160, 200, 256, 320):
        if load_font(path, size).getlength(text) > canvas[0] * 0.94 or size > canvas[1] * 0.95:
            break
        largest = max(size, smallest)
    if rng.random() < 0.5:
        size = round(smallest * (largest / smallest) ** rng.random())
    else:
        size = int(rng.integers(smallest, largest + 1))
    font = load_font(path, size)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = font.getbbox(text)
    x = rng.uniform(0, max(0.0, canvas[0] - (right - left))) - left
    y = rng.uniform(0, max(0.0, canvas[1] - (bottom - top))) - top
    if rng.random() < 0.6:
        color: Color = tuple(int(v) for v in rng.integers(0, 60, 3))  # type: ignore[assignment]
    else:
        color = (0, 0, 0)
    if rng.random() < 0.15:
        color = tuple(
            int(v * 0.55)
            for v in color_of(rng, str(rng.choice(["red", "blue", "green", "purple"])))
        )  # type: ignore[assignment]
    draw.text((x, y), text, fill=color, font=font)
    marks = []
    for i, char in enumerate(text):
        start, stop = font.getlength(text[:i]), font.getlength(text[: i + 1])
        middle = x + (start + stop) / 2, y + (top + bottom) / 2
        marks.append(Mark(*middle, stop - start, bottom - top, digit=int(char)))
    return Picture(finish(rng, image), tuple(marks))


def draw_digits(rng: np.random.Generator, canvas: tuple[int, int], smallest: int) -> Picture:
    """Draw scattered digits of all sizes and fonts; used for training only."""
    image = new_canvas(rng, canvas)
    draw = ImageDraw.Draw(image)
    files = ("", *font_files())
    largest = max(smallest, int(min(canvas) * 0.9))
    boxes: list[tuple[float, float, float, float]] = []
    marks = []
    path = str(rng.choice(files))
    for _ in range(40):
        if rng.random() < 0.2:
            path = str(rng.choice(files))
        font = load_font(path, round(smallest * (largest / smallest) ** (rng.random() ** 1.5)))
        digit = int(rng.integers(10))
        left, top, right, bottom = font.getbbox(str(digit))
        width, height = right - left, bottom - top
        if width >= canvas[0] or height >= canvas[1]:
            continue
        x, y = rng.uniform(0, canvas[0] - width), rng.uniform(0, canvas[1] - height)
        if any(x < b[2] and b[0] < x + width and y < b[3] and b[1] < y + height for b in boxes):
            continue
        boxes.append((x, y, x + width, y + height))
        color = tuple(int(v) for v in rng.integers(0, 90, 3))
        draw.text((x - left, y - top), str(digit), fill=color, font=font)
        marks.append(Mark(x + width / 2, y + height / 2, width, height, digit=digit))
    return Picture(finish(rng, image), tuple(marks))


def choose_number(rng: np.random.Generator, canvas: tuple[int, int], size: int = 18) -> str:
    """Return one to five random digits that fit the canvas at a font size."""
    most = max(1, min(5, int(canvas[0] * 0.9 // (size * 0.66))))
    return "".join(str(rng.integers(10)) for _ in range(rng.integers(1, most + 1)))


def draw_motion(
    rng: np.random.Generator, canvas: tuple[int, int], direction: str, num_frames: int
) -> list[Picture]:
    """Draw a shape that moves in a (nearly) straight line over part of the canvas."""
    axis = 0 if direction in ("left", "right") else 1
    sign = 1 if direction in ("right", "down") else -1
    size = min(canvas) * rng.uniform(0.15, 0.5)
    span = canvas[axis] - size
    way = span * rng.uniform(0.3, 1.0)
    start = [float(rng.uniform(size / 2, side - size / 2)) for side in canvas]
    low = size / 2 + rng.uniform(0, span - way)
    start[axis] = low if sign > 0 else low + way
    drift = rng.uniform(-0.04, 0.04) * canvas[1 - axis] if rng.random() < 0.3 else 0.0
    color, shape = str(rng.choice(COLORS)), str(rng.choice(SHAPES))
    shade, style = color_of(rng, color), choose_style(rng, shape)
    base = new_canvas(rng, canvas)
    quality = int(rng.integers(35, 90)) if rng.random() < 0.5 else 0
    frames = []
    for i in range(num_frames):
        part = i / (num_frames - 1)
        center = list(start)
        center[axis] += sign * way * part
        center[1 - axis] += drift * part
        frame = base.copy()
        paint(frame, center[0], center[1], size, shade, style)
        if quality:
            buffer = io.BytesIO()
            frame.save(buffer, "JPEG", quality=quality)
            frame = Image.open(buffer).convert("RGB")
        frames.append(Picture(frame, (Mark(center[0], center[1], size, size, color, shape),)))
    return frames


def save_mp4(path: Path, frames: list[Image.Image], rate: int = 4) -> None:
    """Write frames as an MPEG-4 file, with sides cropped to even numbers for the codec."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=rate, bit_rate=4_000_000)
        stream.width, stream.height = (side // 2 * 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            cut = frame.crop((0, 0, stream.width, stream.height))
            file.mux(stream.encode(av.VideoFrame.from_image(cut)))
        file.mux(stream.encode(None))
