"""Shapes of training batches: pictures, what lies on each patch, conversations of one layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from .draw import Picture
from .paint import COLORS, SHAPES

IMAGE_PIXELS = (168 * 168, 308 * 308)
VIDEO_PIXELS = (112 * 112, 112 * 112)
FACTOR, PATCH = 28, 14


def smart_resize(height: int, width: int, low: int, high: int) -> tuple[int, int]:
    """qwen-vl-utils' rule: multiples of 28 with an area between low and high."""
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
    """One image or video place of a batch: uint8 [b * frames, H, W, 3] and labels of patches."""

    pixels: torch.Tensor
    temporal: int  # temporal patches
    offset: int = 0
    labels: dict[str, torch.Tensor] = field(default_factory=dict)  # [b, patches]

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.temporal, self.pixels.shape[1] // PATCH, self.pixels.shape[2] // PATCH

    @property
    def num_tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w // 4


@dataclass
class Batch:
    kind: str
    token_ids: torch.Tensor  # [b, n]
    labels: torch.Tensor  # [b, n], -100 where no answer is
    positions: torch.Tensor  # [3, n]
    items: list[Item]
    questions: list[str]
    answers: list[str]


def merge_order(grid: np.ndarray) -> np.ndarray:
    h, w = grid.shape[:2]
    rest = grid.shape[2:]
    return grid.reshape(h // 2, 2, w // 2, 2, *rest).swapaxes(1, 2).reshape(h * w, *rest)


def patch_labels(
    picture: Picture, canvas: tuple[int, int], h: int, w: int
) -> dict[str, np.ndarray]:
    """What lies on each patch of the resized picture."""
    color, shape = np.zeros((h, w), np.int64), np.zeros((h, w), np.int64)
    centre, digit = np.zeros((h, w), np.int64), np.zeros((h, w, 2), np.int64)
    order = np.zeros((h, w, 2), np.int64)  # which one it is, from the left
    ranks = {id(m): min(6, i + 1) for i, m in enumerate(sorted(picture.marks, key=lambda m: m.x))}
    sx, sy = w / canvas[0], h / canvas[1]
    ys, xs = np.mgrid[0:h, 0:w] + 0.5
    for mark in picture.marks:
        x, y = mark.x * sx, mark.y * sy
        row, col = min(h - 1, int(y)), min(w - 1, int(x))
        if mark.digit >= 0:
            half = int((x - col) * 2) % 2
            digit[row, col, half], order[row, col, half] = mark.digit + 1, ranks[id(mark)]
            continue
        inside = ((xs - x) / (mark.size / 2 * sx)) ** 2 + (
            (ys - y) / (mark.size / 2 * sy)
        ) ** 2 < 0.9
        color[inside] = 1 + COLORS.index(mark.color)
        shape[inside] = 1 + SHAPES.index(mark.shape)
        centre[row, col], order[row, col] = 1, ranks[id(mark)]
    found = {"color": color, "shape": shape, "centre": centre, "digit": digit, "order": order}
    return {name: merge_order(labels) for name, labels in found.items()}
