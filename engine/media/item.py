"""Data types of preprocessed media: items, encode units and their content hashes."""

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
    """Sizes of the vision tower's patches, tokens and encode units."""

    patch_size: int  # side of a patch, pixels
    temporal_patch_size: int  # frames per patch
    merge_size: int  # side of a token, patches
    max_unit_temporal_patches: int  # maximum temporal patches per encode unit
    hidden_size: int  # size of a token's embedding

    @property
    def factor(self) -> int:
        """Side of a token, pixels."""
        return self.patch_size * self.merge_size

    @property
    def unit_frames(self) -> int:
        """Frames per unit of a video; the last unit may have fewer."""
        return self.max_unit_temporal_patches * self.temporal_patch_size

    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        depth = -(-num_frames // self.temporal_patch_size)
        return depth, height // self.patch_size, width // self.patch_size


@dataclass(frozen=True)
class MediaInfo:
    """Result of preprocessing an item, as returned to the caller."""

    kind: str  # "image" | "video"
    height: int  # pixels after resizing
    width: int
    num_frames: int
    num_tokens: int
    grid_thw: Grid
    frame_indices: tuple[int, ...] = ()  # sampled frames of the file
    sample_fps: float | None = None
    frame_times: tuple[float, ...] = ()  # seconds from the video's first frame
    raw_fps: float | None = None  # passed by the caller with a list of frames


@dataclass(frozen=True, eq=False)
class MediaItem:
    """An image or video without its pixels, which are decoded separately, unit by unit."""

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
    """Content of an encode unit: either pixels or embeddings."""

    media_hash: bytes
    grid_thw: Grid
    pixels: Pixels | None  # uint8 [frames, height, width, 3]; an image has one frame
    embeds: Embeds | None = None  # set if `pixels` is None


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
    """Return a unit of resized pixels [frames, height, width, 3]."""
    return UnitContent(media_hash(kind, pixels), shape.grid(*pixels.shape[:3]), pixels)


def make_embeds_unit(kind: str, embeds: Embeds, grid: Grid) -> UnitContent:
    """Return a unit of embeddings [num_tokens, hidden_size] over a grid of patches."""
    return UnitContent(embeds_hash(kind, embeds, grid), grid, None, embeds)


def media_hash(kind: str, pixels: Pixels) -> bytes:
    """Return the SHA-256 of a unit's kind, shape and resized pixels, each with its length.

    Options are not hashed: they act only through the resized pixels, so equal units share a hash.
    """
    return _hash(b"octavo.media.v1", (kind, repr(pixels.shape)), pixels)


def embeds_hash(kind: str, embeds: Embeds, grid: Grid) -> bytes:
    """Return the SHA-256 of embeddings as little-endian float32.

    The tag differs from that of pixels: embeddings from a caller may differ from the vision
    tower's output, so they must never share a cache entry with pixels.
    """
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
