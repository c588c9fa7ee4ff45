"""Split rows of any length into tiles, one per program of an attention kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .launch import FEW_PROGRAMS

MIN_SPLIT = 1024  # keys per split: fewer do not pay for the join
MAX_SPLITS = 8


@lru_cache(maxsize=8)  # all layers of a step share the result
def cut_tiles(
    lengths: tuple[int, ...], size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (row, start) of each tile of `size`, int32 [tiles] each, on the device.

    The last tiles come first: in causal attention they have the most keys, and an early start
    balances the load. Rows of length 0 have no tile.
    """
    tiles = [(row, at) for row, length in enumerate(lengths) for at in range(0, length, size)]
    tiles.reverse()
    rows, starts = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2).T.contiguous().to(device)
    return rows, starts


def count_tiles(lengths: tuple[int, ...], size: int) -> int:
    """Return the number of tiles of `size` that rows of these lengths need."""
    return sum(-(-length // size) for length in lengths)


@dataclass(frozen=True)
class ChunkTiles:
    """Distribution of chunks over programs: tiles of queries, with one or more key splits."""

    tiles: torch.Tensor  # int32 [t, 4]: row, start, split, number of splits
    joins: torch.Tensor  # int32 [j, 4], one per tile: row, start, splits, first in `tiles`


def chunk_splits(count: int, context: int, group: int, num_kv_heads: int) -> int:
    """Return the number of key splits of a chunk's tiles.

    It is above 1 if the chunk alone, in tiles of 64, would leave most of a device idle. Depends on
    the row only, for batch invariance.
    """
    programs = -(-count * group // 64) * num_kv_heads
    return max(1, min(MAX_SPLITS, 2 * FEW_PROGRAMS // max(1, programs), context // MIN_SPLIT))


@lru_cache(maxsize=8)
def cut_chunks(
    lengths: tuple[int, ...], splits: tuple[int, ...], size: int, device: torch.device
) -> ChunkTiles:
    """Return tiles of `size` tokens, one per split of its row; a row's last tiles come first."""
    tiles: list[tuple[int, ...]] = []
    joins: list[tuple[int, ...]] = []
    for row, (length, number) in enumerate(zip(lengths, splits, strict=True)):
        for start in reversed(range(0, length, size)):
            joins.append((row, start, number, len(tiles)))
            tiles += [(row, start, split, number) for split in range(number)]
    made = (torch.tensor(x, dtype=torch.int32).to(device) for x in (tiles, joins))
    return ChunkTiles(*made)
