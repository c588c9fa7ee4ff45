"""Counts the KV cache's blocks: which are free, which belong to whom. Holds no memory itself."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class BlockManager:
    """Hands out blocks of `block_size` tokens. A block has one owner; freed ones are reused first,
    so that a lightly loaded cache stays small."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 comes first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, block_table: array[int], num_tokens: int) -> bool:
        """Extends a table to hold `num_tokens` tokens; False, and no change, if it cannot."""
        missing = self.num_needed(num_tokens) - len(block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block_table.append(self._free.pop())
        return True

    def free(self, block_table: array[int]) -> None:
        """Takes every block of a table back and empties it."""
        self._free.extend(reversed(block_table))
        del block_table[:]

    def check_integrity(self, block_tables: Iterable[array[int]]) -> None:
        """Every block is free or in one of the tables, once."""
        seen = sorted([*self._free, *(block for table in block_tables for block in table)])
        assert seen == list(range(self.num_blocks)), "blocks leaked or are shared"
