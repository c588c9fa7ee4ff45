"""What the vision tower would have made of an item, given by the caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class MediaEmbeds:
    """Stands in the place of an image or a video."""

    values: Any  # [n, hidden]: a row for each token; a numpy or torch array
    grid_thw: tuple[int, int, int]  # patches in time, height, width
