"""KV-cache block accounting: free blocks, reference counts and content hashes.

A block is in one of three states:

    in use     ref_count > 0: it is in that many block tables
    evictable  ref_count = 0, block_hash set: free, but reusable by a request with that prefix
    unused     ref_count = 0, no block_hash: free, without reusable content

Allocation takes unused blocks first, then the least recently used evictable one. The KV tensors
are owned by the workers.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockManager:
    """Allocate blocks of `block_size` tokens and find cached ones by content hash."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._ref_counts = array("i", bytes(4 * num_blocks))
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}  # block hash -> block id
        self._unused = list(range(num_blocks - 1, -1, -1))  # stack: light load touches few blocks
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._unused) + len(self._evictable)

    @property
    def num_evictable(self) -> int:
        """Return the number of free blocks with reusable content."""
        return len(self._evictable)

    def num_needed(self, num_tokens: int) -> int:
        """Return the number of blocks for `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find(self, block_hash: bytes) -> int | None:
        """Return the block with this content, in use or free; None if not cached."""
        return self._cached.get(block_hash)

    def num_free_beside(self, blocks: Iterable[int]) -> int:
        """Return the number of blocks that stay free after sharing `blocks`."""
        return self.num_free - sum(self._ref_counts[block] == 0 for block in blocks)

    def num_only_in(self, block_tables: Iterable[array[int]], excluded: Iterable[int]) -> int:
        """Return how many blocks releasing these tables frees, not counting `excluded`."""
        counts = Counter(itertools.chain.from_iterable(block_tables))
        for block in excluded:
            counts.pop(block, None)
        return sum(count == self._ref_counts[block] for block, count in counts.items())

    def share(self, block_table: array[int], blocks: Iterable[int]) -> None:
        """Append cached `blocks` to a table and reference them."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._evictable[block]
            self._ref_counts[block] += 1
            block_table.append(block)

    def grow(self, block_table: array[int], num_tokens: int) -> bool:
        """Extend a table to hold `num_tokens` tokens.

        Returns False, and changes nothing, if there are too few free blocks.
        """
        missing = self.num_needed(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block_table.append(self._take())
        return True

    def copy_on_write(self, block_table: array[int], index: int) -> tuple[int, int]:
        """Replace the shared block at `index` by a new one.

        Returns (old, new); the workers copy the content. The caller ensures that a block is free.
        """
        old, new = block_table[index], self._take()
        block_table[index] = new
        self._drop(old)
        return old, new

    def seal(self, block: int, block_hash: bytes) -> None:
        """Register the hash of a full, computed block, so that its content can be found.

        Does nothing if another block has this content, or if the block is registered already (by
        a request that shares it).
        """
        if block_hash not in self._cached and self._hashes[block] is None:
            self._cached[block_hash] = block
            self._hashes[block] = block_hash

    def forget(self, blocks: Iterable[int]) -> None:
        """Unregister blocks whose content may be invalid, so that they are not reused."""
        for block in blocks:
            self._unseal(block)
            if block in self._evictable:
                del self._evictable[block]
                self._unused.append(block)

    def reset(self) -> None:
        """Unregister all blocks after their memory was lost. No table may hold a block."""
        assert self.num_free == self.num_blocks
        for block in self._evictable:
            self._unseal(block)
        self._unused.extend(self._evictable)
        self._evictable.clear()

    def free(self, block_table: array[int]) -> None:
        """Release all blocks of a table and empty it.

        The table's last blocks are evicted first: more requests share a prefix than its
        continuation.
        """
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
        """Return copies of all reference counts and of the evictable blocks."""
        return self._ref_counts[:], array("i", self._evictable)

    def check_integrity(self, block_tables: Iterable[array[int]]) -> None:
        """Assert that states and reference counts agree with these block tables."""
        counts = [0] * self.num_blocks
        for table in block_tables:
            assert len(set(table)) == len(table), "a block table has a duplicate block"
            for block in table:
                counts[block] += 1
        assert counts == list(self._ref_counts), "reference counts differ from the block tables"
        free = [*self._unused, *self._evictable]
        assert sorted(free) == [b for b in range(self.num_blocks) if counts[b] == 0], "leak"
        assert all(self._hashes[block] is None for block in self._unused)
        assert all(self._hashes[block] is not None for block in self._evictable)
        registered = {h: block for block, h in enumerate(self._hashes) if h is not None}
        assert registered == self._cached, "hash index and block hashes differ"
