"""Precomputed embeddings that a caller passes in place of pixels.

All APIs use `MediaEmbeds`; the loader validates its content before the request is admitted.
Torch tensors are detected by duck typing, to avoid importing torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ...scheduler.params import truncated_repr
from ..config.media_limits import MediaLimits
from ..errors import InputError
from .item import Embeds, Grid, PatchShape
from .options import MediaOptions

DTYPES = ("float32", "float16", "bfloat16")  # numpy lacks bfloat16
MAX_VALUE = float(np.finfo(np.float16).max)  # values stay finite in every dtype of the model
MAX_SIDE = 1 << 24  # maximum of each number of a grid, patches


@dataclass(frozen=True, eq=False)
class MediaEmbeds:
    """An image or a video as the vision tower's output, after its merger.

    `values` [num_tokens, hidden_size] is a numpy array of float32 or float16, or a torch tensor of
    float32, float16 or bfloat16. `grid_thw` counts patches before merging: temporal, height, width;
    so num_tokens = t × h × w / merge_size². An image has t = 1. Both have the format that the
    vision tower and the processor of transformers return for one item.
    """

    values: Any
    grid_thw: Any


def check_options(options: MediaOptions, field: str) -> None:
    """Raise `InputError` if any option is set: options have no effect on embeddings."""
    for option in fields(options):
        if getattr(options, option.name) is not None:
            text = f"{option.name} has no effect on embeddings, whose size is fixed; remove it"
            raise InputError(field, text)


def read_grid(
    embeds: MediaEmbeds, kind: str, shape: PatchShape, limits: MediaLimits, field: str
) -> Grid:
    """Return the grid. Raises `InputError` if it is invalid for `kind` or exceeds a limit."""
    field = f"{field}.grid_thw"
    grid = _three_numbers(embeds.grid_thw, field)
    depth, height, width = grid
    if kind == "image" and depth != 1:
        raise InputError(field, f"{grid}: an image has t = 1; pass a video as a video")
    if height % shape.merge_size or width % shape.merge_size:
        text = f"{grid}: h and w count patches before merging and must be multiples of"
        raise InputError(field, f"{text} {shape.merge_size}")
    limits.check_size(width * shape.patch_size, height * shape.patch_size, field)
    if kind == "video":
        limits.check_frames(depth * shape.temporal_patch_size, field)
    return grid


def _three_numbers(given: Any, field: str) -> Grid:
    """Read a sequence or array of 3 integers, or an array [1, 3] as processors return it."""
    found = given
    if tuple(getattr(given, "shape", ())) in ((3,), (1, 3)):
        found = given.reshape(3).tolist()
    if isinstance(found, str | bytes) or not isinstance(found, Sequence) or len(found) != 3:
        raise InputError(field, f"{truncated_repr(given)}: must be three integers: t, h and w")
    for number in found:
        is_integer = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if not is_integer or not 1 <= number <= MAX_SIDE:
            text = f"{truncated_repr(number)}: must be an integer from 1 to {MAX_SIDE}"
            raise InputError(field, text)
    return int(found[0]), int(found[1]), int(found[2])


def check_values(
    embeds: MediaEmbeds, grid: Grid, shape: PatchShape, limits: MediaLimits, field: str
) -> None:
    """Raise `InputError` if the values have a wrong type or shape; the numbers are not read."""
    values, field = embeds.values, f"{field}.values"
    if _dtype_of(values) not in DTYPES:
        found_type = getattr(values, "dtype", None) or type(values).__name__
        raise InputError(
            field,
            f"{truncated_repr(str(found_type))}: must be a numpy array of float32 or float16, or a "
            "torch tensor of float32, float16 or bfloat16",
        )
    found = tuple(values.shape)
    if len(found) != 2:
        raise InputError(field, f"shape {found}: must be [num_tokens, {shape.hidden_size}]")
    if found[1] != shape.hidden_size:
        raise InputError(
            field,
            f"shape {found}: this model's embeddings have {shape.hidden_size} values per token; "
            "compute them with the vision tower of the same checkpoint",
        )
    num_tokens = math.prod(grid) // shape.merge_size**2
    if found[0] != num_tokens:
        text = f"{found[0]} tokens, but grid_thw={grid} has {num_tokens}: t × h × w /"
        raise InputError(field, f"{text} {shape.merge_size**2}")
    limits.check_bytes(math.prod(found) * 4, field)


def _dtype_of(values: Any) -> str | None:
    """Return the dtype name of an array or a dense tensor; None for other values."""
    if isinstance(values, np.ndarray):
        return values.dtype.name
    if hasattr(values, "detach") and str(getattr(values, "layout", "")) == "torch.strided":
        return str(values.dtype).removeprefix("torch.")
    return None


def read_values(embeds: MediaEmbeds, field: str) -> Embeds:
    """Return a float32 copy of values that passed `check_values`.

    Float32 represents all values of the other dtypes exactly, and the caller may modify its array
    afterwards. Raises `InputError` if a value is not finite or too large.
    """
    field = f"{field}.values"
    try:
        copied = np.array(_to_numpy(embeds.values), np.float32, order="C")
    except (RuntimeError, TypeError, ValueError) as error:  # for example, a tensor without storage
        text = f"{type(embeds.values).__name__}: its values cannot be read"
        raise InputError(field, text) from error
    low, high = copied.min(), copied.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(field, "has NaN or infinite values")
    if max(-low, high) > MAX_VALUE:
        text = f"has a value of magnitude {max(-low, high):.6g}: must be at most {MAX_VALUE:.0f}"
        raise InputError(field, text)
    return copied


def _to_numpy(values: Any) -> npt.NDArray:
    return values if isinstance(values, np.ndarray) else values.detach().cpu().float().numpy()
