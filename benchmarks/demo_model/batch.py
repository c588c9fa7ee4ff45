"""Training batches: pictures, patch labels and conversations of one layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from .draw import DIRECTIONS, Mark
from .paint import COLORS, SHAPES

IMAGE_PIXELS = (168 * 168, 364 * 364)
VIDEO_PIXELS = (112 * 112, 112 * 112)
FACTOR, PATCH = 28, 14


def smart_resize(height: int, width: int, low: int, high: int) -> tuple[int, int]:
    """Return multiples of 28 with an area between low and high (qwen-vl-utils' rule)."""
    h, w = max(FACTOR, round(height / FACTOR) * FACTOR), max(FACTOR, round(width / FACTOR) * FACTOR)
    if h * w > high:
        beta = math.sqrt(height * width / high)
        h, w = (max(FACTOR, math.floor(s / beta / FACTOR) * FACTOR) for s in (height, width))
    elif h * w < low:
        beta = math.sqrt(low / (height * width))
        h, w = (math.ceil(s * beta / FACTOR) * FACTOR for s in (height, width))
    return h, w


@dataclass
class Item:
    """One image or video position of a batch: pixels and patch labels of b pictures.

    Pixels are uint8 [b * frames, H, W, 3].
    """

    pixels: torch.Tensor
    temporal: int  # temporal patches
    offset: int = 0
    labels: dict[str, torch.Tensor] = field(default_factory=dict)  # [b * temporal, patches]
    rows: torch.Tensor | None = None  # picture index of each conversation; None: one each

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.temporal, self.pixels.shape[1] // PATCH, self.pixels.shape[2] // PATCH

    @property
    def num_pictures(self) -> int:
        frames = 1 if self.temporal == 1 else 2 * self.temporal
        return len(self.pixels) // frames

    @property
    def num_tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w // 4


@dataclass
class Batch:
    kind: str
    token_ids: torch.Tensor  # [b, n]
    labels: torch.Tensor  # [b, n], -100 outside the answers
    positions: torch.Tensor  # [3, n]
    items: list[Item]
    shown_in: torch.Tensor  # [b, n]: word shown in image 0, 1 or both (2); else -100
    questions: list[str]
    answers: list[str]


def merge_order(grid: np.ndarray) -> np.ndarray:
    h, w = grid.shape[:2]
    rest = grid.shape[2:]
    return grid.reshape(h // 2, 2, w // 2, 2, *rest).swapaxes(1, 2).reshape(h * w, *rest)


def patch_labels(
    marks: tuple[Mark, ...], canvas: tuple[int, int], h: int, w: int, direction: str = ""
) -> dict[str, np.ndarray]:
    """Label each of the h x w patches of the resized picture; 0 means empty.

    Digits and the left-to-right order of marks have a label for each half of a patch, since a
    patch may contain two small digits.
    """
    color, shape, centre, motion = (np.zeros((h, w), np.int64) for _ in range(4))
    digit, order = (np.zeros((h, w, 2), np.int64) for _ in range(2))
    sx, sy = w / canvas[0], h / canvas[1]
    ys, xs = np.mgrid[0:h, 0:w] + 0.5
    halves = (np.arange(2 * w).reshape(w, 2) + 0.5) / 2
    for rank, mark in enumerate(sorted(marks, key=lambda m: m.x)):
        x, y, rx, ry = mark.x * sx, mark.y * sy, mark.width / 2 * sx, mark.height / 2 * sy
        row, col = min(h - 1, int(y)), min(w - 1, int(x))
        centre[row, col] = 1
        if mark.digit >= 0:
            over = np.minimum(ys[:, 0] + 0.5, y + ry) - np.maximum(ys[:, 0] - 0.5, y - ry)
            rows = over > 0.4 * min(1.0, 2 * ry)
            rows[row] = True
            covered = rows[:, None, None] & (abs(halves - x) < rx)[None]
            covered[row, col, int((x - col) * 2) % 2] = True
            digit[covered], order[covered] = mark.digit + 1, rank + 1
            continue
        inside = ((xs - x) / rx) ** 2 + ((ys - y) / ry) ** 2 < 0.9
        inside[row, col] = True
        color[inside] = 1 + COLORS.index(mark.color)
        shape[inside] = 1 + SHAPES.index(mark.shape)
        order[inside] = min(6, rank + 1)
        motion[inside] = 1 + DIRECTIONS.index(direction) if direction else 0
    found = {"color": color, "shape": shape, "centre": centre, "digit": digit, "order": order}
    return {name: merge_order(labels) for name, labels in (found | {"motion": motion}).items()}


def between(first: Mark, second: Mark) -> Mark:
    """Return the mark of a moving shape halfway between two frames."""
    return replace(first, x=(first.x + second.x) / 2, y=(first.y + second.y) / 2)
