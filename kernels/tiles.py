"""Cuts rows of any length into tiles, one for each program of an attention kernel."""

from __future__ import annotations

from functools import lru_cache

import torch


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
