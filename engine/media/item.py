"""An image or a video as the engine has it: what was chosen, and units of pixels as they come."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from .reader import Pixels

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class PatchShape:
    """How pixels are cut: into patches, encode units and tokens."""

    patch_size: int  # pixels of a patch's side
    temporal_patch_size: int  # frames of a patch
    merge_size: int  # patches of a token's side
    max_unit_temporal_patches: int  # temporal patches of an encode unit, at most

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.patch_size * self.merge_size

    @property
    def unit_frames(self) -> int:
        """Frames of a video's unit, but for its last one."""
        return self.max_unit_temporal_patches * self.temporal_patch_size

    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        depth = -(-num_frames // self.temporal_patch_size)
        return depth, height // self.patch_size, width // self.patch_size


@dataclass(frozen=True)
class MediaInfo:
    """What was made of an item, as echoed to the caller."""

    kind: str  # "image" | "video"
    height: int  # pixels after resizing
    width: int
    num_frames: int
    num_tokens: int
    grid_thw: Grid
    frame_indices: tuple[int, ...] = ()  # of the file's frames
    sample_fps: float | None = None
    frame_times: tuple[float, ...] = ()  # seconds from the video's first frame


@dataclass(frozen=True, eq=False)
class MediaItem:
    """What was chosen of an image or a video. Its pixels come apart, unit by unit."""

    info: MediaInfo

    @property
    def kind(self) -> str:
        return self.info.kind

    @property
    def grid_thw(self) -> Grid:
        return self.info.grid_thw

    @property
    def num_tokens(self) -> int:
        return self.info.num_tokens


@dataclass(frozen=True, eq=False)
class UnitContent:
    """What an encode unit's embedding is made of."""

    media_hash: bytes
    grid_thw: Grid
    pixels: Pixels  # uint8 [frames, height, width, 3]; an image has one frame


def make_item(
    kind: str,
    num_frames: int,
    height: int,
    width: int,
    shape: PatchShape,
    frame_indices: tuple[int, ...] = (),
    frame_times: tuple[float, ...] = (),
    sample_fps: float | None = None,
) -> MediaItem:
    grid = shape.grid(num_frames, height, width)
    num_tokens = math.prod(grid) // shape.merge_size**2
    return MediaItem(
        MediaInfo(
            kind,
            height,
            width,
            num_frames,
            num_tokens,
            grid,
            frame_indices,
            sample_fps,
            frame_times,
        )
    )


def make_unit(kind: str, pixels: Pixels, shape: PatchShape) -> UnitContent:
    """A unit of resized pixels [frames, height, width, 3]."""
    return UnitContent(media_hash(kind, pixels), shape.grid(*pixels.shape[:3]), pixels)


def media_hash(kind: str, pixels: Pixels) -> bytes:
    """SHA-256 of a unit's canonical pixels, tagged and with every part's length.

    The resized pixels carry all that options did; so equal units of different options are one.
    """
    digest = hashlib.sha256(b"octavo.media.v1")
    for part in (kind.encode(), repr(pixels.shape).encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    digest.update(pixels.nbytes.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()
