"""An image or a video as the engine has it: what was chosen, and units of pixels as they come."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .decode.reader import Pixels

Grid = tuple[int, int, int]
Embeds = npt.NDArray[np.float32]  # [num_tokens, hidden_size]


@dataclass(frozen=True)
class PatchShape:
    """How pixels are cut: into patches, encode units and tokens; and what a token becomes."""

    patch_size: int  # pixels of a patch's side
    temporal_patch_size: int  # frames of a patch
    merge_size: int  # patches of a token's side
    max_unit_temporal_patches: int  # temporal patches of an encode unit, at most
    hidden_size: int  # numbers of a token's embedding

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
    raw_fps: float | None = None  # as the caller said of a list of frames


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
    """What an encode unit's embedding is made of: pixels, or itself as a caller brought it."""

    media_hash: bytes
    grid_thw: Grid
    pixels: Pixels | None  # uint8 [frames, height, width, 3]; an image has one frame
    embeds: Embeds | None = None  # where there are no pixels


def make_item(
    kind: str,
    num_frames: int,
    height: int,
    width: int,
    shape: PatchShape,
    frame_indices: tuple[int, ...] = (),
    frame_times: tuple[float, ...] = (),
    sample_fps: float | None = None,
    raw_fps: float | None = None,
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
            raw_fps,
        )
    )


def make_unit(kind: str, pixels: Pixels, shape: PatchShape) -> UnitContent:
    """A unit of resized pixels [frames, height, width, 3]."""
    return UnitContent(media_hash(kind, pixels), shape.grid(*pixels.shape[:3]), pixels)


def make_embeds_unit(kind: str, embeds: Embeds, grid: Grid) -> UnitContent:
    """A unit of embeddings [num_tokens, hidden_size] over a grid of patches."""
    return UnitContent(embeds_hash(kind, embeds, grid), grid, None, embeds)


def media_hash(kind: str, pixels: Pixels) -> bytes:
    """SHA-256 of a unit's canonical pixels, tagged and with every part's length.

    The resized pixels carry all that options did; so equal units of different options are one.
    """
    return _hash(b"octavo.media.v1", (kind, repr(pixels.shape)), pixels)


def embeds_hash(kind: str, embeds: Embeds, grid: Grid) -> bytes:
    """The same of embeddings as little-endian float32: never the hash of any pixels, since nobody
    knows whether they are what the tower makes of those."""
    numbers = embeds.astype("<f4", copy=False)
    return _hash(b"octavo.embeds.v1", (kind, repr(embeds.shape), repr(grid)), numbers)


def _hash(tag: bytes, parts: tuple[str, ...], content: npt.NDArray) -> bytes:
    digest = hashlib.sha256(tag)
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little"))
        digest.update(part.encode())
    digest.update(content.nbytes.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(content).data)
    return digest.digest()
