"""Cuts rows of any length into tiles, one for each program of an attention kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .launch import FEW_PROGRAMS

MIN_SPLIT = 1024  # keys of a chunk's split: fewer do not pay for the join
MAX_SPLITS = 8


@lru_cache(maxsize=8)  # every layer of a step cuts the same rows
def cut_tiles(
    lengths: tuple[int, ...], size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, start) of each tile of `size`, int32 [tiles] on the device. A length of 0 has none.

    The last tiles come first: in causal attention they have most keys, and end no later for it.
    """
    tiles = [(row, at) for row, length in enumerate(lengths) for at in range(0, length, size)]
    tiles.reverse()
    rows, starts = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2).T.contiguous().to(device)
    return rows, starts


def count_tiles(lengths: tuple[int, ...], size: int) -> int:
    return sum(-(-length // size) for length in lengths)


@dataclass(frozen=True)
class ChunkTiles:
    """How chunks are dealt out over programs: tiles of queries, their keys in one split or more."""

    tiles: torch.Tensor  # int32 [t, 4]: row, start, split, number of splits
    joins: torch.Tensor  # int32 [j, 4] of each tile's splits: row, start, number, first of `tiles`


def chunk_splits(count: int, context: int, group: int, num_kv_heads: int) -> int:
    """In how many splits the keys of a chunk's tiles are taken: several where the chunk alone,
    in tiles of 64, would leave most of a device idle. By the row alone: its batch does not matter.
    """
    programs = -(-count * group // 64) * num_kv_heads
    return max(1, min(MAX_SPLITS, 2 * FEW_PROGRAMS // max(1, programs), context // MIN_SPLIT))


@lru_cache(maxsize=8)
def cut_chunks(
    lengths: tuple[int, ...], splits: tuple[int, ...], size: int, device: torch.device
) -> ChunkTiles:
    """Tiles of `size` tokens, each as often as its row has splits; the last of a row come first."""
    tiles: list[tuple[int, ...]] = []
    joins: list[tuple[int, ...]] = []
    for row, (length, number) in enumerate(zip(lengths, splits, strict=True)):
        for start in reversed(range(0, length, size)):
            joins.append((row, start, number, len(tiles)))
            tiles += [(row, start, split, number) for split in range(number)]
    made = (torch.tensor(x, dtype=torch.int32).to(device) for x in (tiles, joins))
    return ChunkTiles(*made)
