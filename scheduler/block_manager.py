"""Counts the KV cache's blocks: which are free, who shares them, what they hold. No memory itself.

A block is in one of three states:

    in use     ref_count > 0: in that many block tables
    evictable  ref_count = 0, block_hash set: free, but a request with its content may take it back
    unused     ref_count = 0, no block_hash: free, holds nothing of use

New blocks come from the unused, then from the evictable, the longest untouched first.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockManager:
    """Hands out blocks of `block_size` tokens and finds them again by their content's hash."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._ref_counts = array("i", bytes(4 * num_blocks))
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}  # block_hash: block_id; each hash has one block
        self._unused = list(range(num_blocks - 1, -1, -1))  # a stack: a light load touches few
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._unused) + len(self._evictable)

    @property
    def num_evictable(self) -> int:
        """Free blocks that a prefix may still be found in."""
        return len(self._evictable)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find(self, block_hash: bytes) -> int | None:
        """The block with that content, in use or not."""
        return self._cached.get(block_hash)

    def num_free_beside(self, blocks: Iterable[int]) -> int:
        """Free blocks that are left once `blocks` are shared."""
        return self.num_free - sum(self._ref_counts[block] == 0 for block in blocks)

    def num_only_in(self, block_tables: Iterable[array[int]], beside: Iterable[int]) -> int:
        """Blocks that would be free if these tables were given up, but for those in `beside`."""
        counts = Counter(itertools.chain.from_iterable(block_tables))
        for block in beside:
            counts.pop(block, None)
        return sum(count == self._ref_counts[block] for block, count in counts.items())

    def share(self, block_table: array[int], blocks: Iterable[int]) -> None:
        """Appends blocks that hold what the table's owner needs."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._evictable[block]
            self._ref_counts[block] += 1
            block_table.append(block)

    def grow(self, block_table: array[int], num_tokens: int) -> bool:
        """Extends a table to hold `num_tokens` tokens; False, and no change, if it cannot."""
        missing = self.num_needed(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block_table.append(self._take())
        return True

    def copy_on_write(self, block_table: array[int], index: int) -> tuple[int, int]:
        """Puts a new block in the place of a shared one; gives (old, new), whose content the
        workers copy. The caller has seen to it that a block is free."""
        old, new = block_table[index], self._take()
        block_table[index] = new
        self._drop(old)
        return old, new

    def seal(self, block: int, block_hash: bytes) -> None:
        """A block is full and computed: from now on its content can be found.

        Where another block has that content already, that one stays the one that is found; and a
        block that was sealed before (by a request it was shared with) stays as it is.
        """
        if block_hash not in self._cached and self._hashes[block] is None:
            self._cached[block_hash] = block
            self._hashes[block] = block_hash

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody is to find these blocks any more: what they hold is in doubt."""
        for block in blocks:
            self._unseal(block)
            if block in self._evictable:
                del self._evictable[block]
                self._unused.append(block)

    def reset(self) -> None:
        """All memory is gone: nothing can be found. No table may hold a block."""
        assert self.num_free == self.num_blocks
        for block in self._evictable:
            self._unseal(block)
        self._unused.extend(self._evictable)
        self._evictable.clear()

    def free(self, block_table: array[int]) -> None:
        """Gives up every block of a table and empties it. Its last blocks are evicted first: a
        prefix is of use to more requests than what follows it."""
        for block in reversed(block_table):
            self._drop(block)
        del block_table[:]

    def _take(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._unseal(block)
        self._ref_counts[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block] > 0:
            return
        if self._hashes[block] is None:
            self._unused.append(block)
        else:
            self._evictable[block] = None

    def _unseal(self, block: int) -> None:
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hashes[block] = None

    def copy_states(self) -> tuple[array[int], array[int]]:
        """For who looks on: a copy of every block's ref_count, and the evictable blocks."""
        return self._ref_counts[:], array("i", self._evictable)

    def check_integrity(self, block_tables: Iterable[array[int]]) -> None:
        """Every block is in one state, and in as many tables as its count says."""
        counts = [0] * self.num_blocks
        for table in block_tables:
            assert len(set(table)) == len(table), "a block is twice in one table"
            for block in table:
                counts[block] += 1
        assert counts == list(self._ref_counts), "reference counts are not those of the tables"
        free = [*self._unused, *self._evictable]
        assert sorted(free) == [b for b in range(self.num_blocks) if counts[b] == 0], "leaked"
        assert all(self._hashes[block] is None for block in self._unused)
        assert all(self._hashes[block] is not None for block in self._evictable)
        sealed = {h: block for block, h in enumerate(self._hashes) if h is not None}
        assert sealed == self._cached, "the hash index is not that of the blocks"
