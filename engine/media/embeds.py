"""Embeddings that a caller brings in place of pixels: what the vision tower would have made.

Every way in uses `MediaEmbeds`; what is in one is checked by the loader, before its request begins.
Torch is not imported here: its tensors are known by their looks.
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

DTYPES = ("float32", "float16", "bfloat16")  # numpy has the first two
MAX_VALUE = float(np.finfo(np.float16).max)  # so that it is finite whatever the model computes in
MAX_SIDE = 1 << 24  # patches of a side, and temporal patches


@dataclass(frozen=True, eq=False)
class MediaEmbeds:
    """An image or a video as the vision tower's output, after its merger.

    `values` [num_tokens, hidden_size] is a numpy array of float32 or float16, or a torch tensor of
    float32, float16 or bfloat16. `grid_thw` counts patches before merging: temporal, height, width;
    so num_tokens = t × h × w / merge_size². An image has t = 1. Both are what transformers' tower
    and processor give for one item.
    """

    values: Any
    grid_thw: Any


def check_options(options: MediaOptions, field: str) -> None:
    """Raises `InputError` for an option beside embeddings: it would do nothing."""
    for option in fields(options):
        if getattr(options, option.name) is not None:
            text = f"{option.name} does nothing for embeddings, whose size is given; leave it out"
            raise InputError(field, text)


def read_grid(
    embeds: MediaEmbeds, kind: str, shape: PatchShape, limits: MediaLimits, field: str
) -> Grid:
    """The grid, where `kind` may have such a one. Raises `InputError`."""
    field = f"{field}.grid_thw"
    grid = _three_numbers(embeds.grid_thw, field)
    depth, height, width = grid
    if kind == "image" and depth != 1:
        raise InputError(field, f"{grid}: an image has t = 1; give a video as a video")
    if height % shape.merge_size or width % shape.merge_size:
        text = f"{grid}: h and w count patches before merging, so are multiples of"
        raise InputError(field, f"{text} {shape.merge_size}")
    limits.check_size(width * shape.patch_size, height * shape.patch_size, field)
    if kind == "video":
        limits.check_frames(depth * shape.temporal_patch_size, field)
    return grid


def _three_numbers(given: Any, field: str) -> Grid:
    """Also of an array of three, or of one row of them, as processors give it."""
    found = given
    if tuple(getattr(given, "shape", ())) in ((3,), (1, 3)):
        found = given.reshape(3).tolist()
    if isinstance(found, str | bytes) or not isinstance(found, Sequence) or len(found) != 3:
        raise InputError(field, f"{truncated_repr(given)}: must be three whole numbers: t, h and w")
    for number in found:
        whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if not whole or not 1 <= number <= MAX_SIDE:
            text = f"{truncated_repr(number)}: must be whole numbers from 1 to {MAX_SIDE}"
            raise InputError(field, text)
    return int(found[0]), int(found[1]), int(found[2])


def check_values(
    embeds: MediaEmbeds, grid: Grid, shape: PatchShape, limits: MediaLimits, field: str
) -> None:
    """Raises `InputError` for values of a wrong type or shape, without looking at them."""
    values, field = embeds.values, f"{field}.values"
    if _dtype_of(values) not in DTYPES:
        what = getattr(values, "dtype", None) or type(values).__name__
        raise InputError(
            field,
            f"{truncated_repr(str(what))}: must be a numpy array of float32 or float16, or a torch "
            "tensor of float32, float16 or bfloat16",
        )
    found = tuple(values.shape)
    if len(found) != 2:
        raise InputError(field, f"shape {found}: must be [num_tokens, {shape.hidden_size}]")
    if found[1] != shape.hidden_size:
        raise InputError(
            field,
            f"shape {found}: this model's embeddings have {shape.hidden_size} numbers a token; "
            "make them by the vision tower of the same checkpoint",
        )
    num_tokens = math.prod(grid) // shape.merge_size**2
    if found[0] != num_tokens:
        text = f"{found[0]} tokens, and grid_thw={grid} has {num_tokens}: t × h × w /"
        raise InputError(field, f"{text} {shape.merge_size**2}")
    limits.check_bytes(math.prod(found) * 4, field)


def _dtype_of(values: Any) -> str | None:
    """The name of an array's or a plain tensor's dtype; None: it is neither."""
    if isinstance(values, np.ndarray):
        return values.dtype.name
    if hasattr(values, "detach") and str(getattr(values, "layout", "")) == "torch.strided":
        return str(values.dtype).removeprefix("torch.")
    return None


def read_values(embeds: MediaEmbeds, field: str) -> Embeds:
    """A copy as float32, which holds every number of the other types; the caller may go on to
    change his. To be called for what `check_values` let pass. Raises `InputError`."""
    field = f"{field}.values"
    try:
        copied = np.array(_to_numpy(embeds.values), np.float32, order="C")
    except (RuntimeError, TypeError, ValueError) as error:  # a tensor without memory, for one
        text = f"{type(embeds.values).__name__}: its numbers cannot be read"
        raise InputError(field, text) from error
    low, high = copied.min(), copied.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(field, "has NaN or infinite numbers")
    if max(-low, high) > MAX_VALUE:
        text = f"has {max(-low, high):.6g}: must be at most {MAX_VALUE:.0f}, up or down"
        raise InputError(field, text)
    return copied


def _to_numpy(values: Any) -> npt.NDArray:
    return values if isinstance(values, np.ndarray) else values.detach().cpu().float().numpy()
