"""Block manager and encoder cache as state machines against the plainest models of themselves."""

from array import array
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.scheduler.block_manager import BlockManager
from octavo.scheduler.encoder_cache import EncoderCache
from octavo.scheduler.request import EncodeUnit, UnitKey

NAMES = st.sampled_from(["a", "b", "c"])


class Blocks(RuleBasedStateMachine):
    """A model of what each table holds: a number for each block's content, so that a block that
    is shared, found, copied or evicted must still hold what its readers expect."""

    NUM_BLOCKS, SIZE = 7, 4
    HASHES = st.sampled_from([bytes([i]) * 32 for i in range(6)])

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(self.NUM_BLOCKS, self.SIZE)
        self.tables: dict[str, array[int]] = {name: array("i") for name in "abc"}
        self.holds: dict[int, bytes] = {}  # block: the hash of what was written to it
        self.found: dict[bytes, int] = {}  # what may be found: sealed and not yet taken anew

    def free_blocks(self) -> set[int]:
        used = {block for table in self.tables.values() for block in table}
        return set(range(self.NUM_BLOCKS)) - used

    def taken(self, block: int) -> None:
        """A block is handed out anew: nobody's, and nothing is found in it from now on."""
        self.holds.pop(block, None)
        self.found = {h: b for h, b in self.found.items() if b != block}

    @rule(name=NAMES, tokens=st.integers(0, 40))
    def grow(self, name: str, tokens: int) -> None:
        table, free = self.tables[name], self.free_blocks()
        before = list(table)
        missing = -(-tokens // self.SIZE) - len(before)
        assert self.manager.grow(table, tokens) == (missing <= len(free))
        assert list(table[: len(before)]) == before
        new = set(table[len(before) :])
        assert len(new) == (max(0, missing) if missing <= len(free) else 0) and new <= free
        # What can be found goes last.
        assert not (new & set(self.found.values())) or not (free - new - set(self.found.values()))
        for block in new:
            self.taken(block)

    @precondition(lambda self: any(self.tables.values()))
    @rule(data=st.data(), block_hash=HASHES)
    def seal(self, data: st.DataObject, block_hash: bytes) -> None:
        table = data.draw(st.sampled_from([t for t in self.tables.values() if t]))
        block = data.draw(st.sampled_from(list(table)))
        if block in self.holds:  # full and computed already
            return
        self.manager.seal(block, block_hash)
        self.holds[block] = block_hash
        self.found.setdefault(block_hash, block)

    @rule(name=NAMES, hashes=st.lists(HASHES, unique=True, max_size=4))
    def share(self, name: str, hashes: list[bytes]) -> None:
        table = self.tables[name]
        if table:
            return
        blocks = [block for h in hashes if (block := self.manager.find(h)) is not None]
        left = self.free_blocks() - set(blocks)
        assert self.manager.num_free_beside(blocks) == len(left)
        self.manager.share(table, blocks)
        assert [self.holds[block] for block in table] == [h for h in hashes if h in self.found]

    @precondition(lambda self: any(self.tables.values()) and self.free_blocks())
    @rule(data=st.data())
    def copy_on_write(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from([t for t in self.tables.values() if t]))
        index = data.draw(st.integers(0, len(table) - 1))
        before, free = list(table), self.free_blocks()
        old, new = self.manager.copy_on_write(table, index)
        assert old == before[index] and new == table[index] and new in free
        before[index] = new
        assert list(table) == before
        self.taken(new)

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        self.manager.forget(self.tables[name])
        self.found = {h: b for h, b in self.found.items() if b not in self.tables[name]}

    @rule(name=NAMES)
    def free(self, name: str) -> None:
        self.manager.free(self.tables[name])
        assert not self.tables[name]

    @invariant()
    def whole(self) -> None:
        self.manager.check_integrity(self.tables.values())
        assert self.manager.num_free == len(self.free_blocks())
        for i in range(6):
            assert self.manager.find(bytes([i]) * 32) == self.found.get(bytes([i]) * 32)


class Encoder(RuleBasedStateMachine):
    """A model with sets: who holds what, and what workers have been told to keep."""

    CAPACITY = 10
    SIZES: ClassVar = {0: 3, 1: 4, 2: 5, 3: 10}
    KEYS = st.sampled_from(sorted(SIZES))

    def __init__(self) -> None:
        super().__init__()
        self.cache = EncoderCache(self.CAPACITY)
        self.holders: dict[int, set[str]] = {key: set() for key in self.SIZES}
        self.kept: set[UnitKey] = set()  # by the workers

    def unit(self, key: int) -> EncodeUnit:
        return EncodeUnit(bytes([key]), 0, 0, self.SIZES[key], 4 * self.SIZES[key])

    def held(self) -> int:
        return sum(self.SIZES[key] for key, who in self.holders.items() if who)

    @rule(key=KEYS, name=NAMES)
    def hold(self, key: int, name: str) -> None:
        unit = self.unit(key)
        assert self.cache.room() == self.CAPACITY - self.held()
        cost = self.cache.tokens_to_hold(unit)
        assert cost == (0 if self.holders[key] else self.SIZES[key])
        if cost > self.cache.room():
            return
        before = (self.cache.num_added, self.cache.num_found)
        is_new = self.cache.hold(unit, name)
        is_found = not is_new and name not in self.holders[key]
        after = (before[0] + is_new, before[1] + is_found)
        assert (self.cache.num_added, self.cache.num_found) == after
        self.kept -= set(self.cache.take_evicted())
        assert is_new == (unit.key not in self.kept)
        self.kept.add(unit.key)
        self.holders[key].add(name)

    @rule(key=KEYS, name=NAMES)
    def release(self, key: int, name: str) -> None:
        self.cache.release((bytes([key]), 0), name)
        self.holders[key].discard(name)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.kept)))
        self.cache.lose(key)
        self.kept.remove(key)
        self.holders[key[0][0]].clear()

    @invariant()
    def whole(self) -> None:
        by_name = {
            name: {(bytes([key]), 0) for key, who in self.holders.items() if name in who}
            for name in "abc"
        }
        self.cache.check_integrity(by_name)
        for key, who in self.holders.items():
            assert not who or (bytes([key]), 0) in self.kept, "held but not kept"
        assert all(key in self.cache for key in self.kept)
        assert sum(self.SIZES[key[0][0]] for key in self.kept) <= self.CAPACITY


Blocks.TestCase.settings = Encoder.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None
)
TestBlocks = Blocks.TestCase
TestEncoder = Encoder.TestCase


def test_the_longest_untouched_is_evicted_first_and_a_prefix_last() -> None:
    manager = BlockManager(4, 4)
    first, second = array("i"), array("i")
    manager.grow(first, 8)
    manager.grow(second, 8)
    for block, name in zip([*first, *second], b"abcd", strict=True):
        manager.seal(block, bytes([name]))
    manager.free(first)
    manager.free(second)
    manager.share(first, [manager.find(b"a")])  # type: ignore[list-item]
    manager.free(first)  # now the latest touched
    order = []
    for _ in range(4):
        manager.grow(second, 4 * len(second) + 4)
        order.append([name for name in "abcd" if manager.find(name.encode()) is None])
    assert order == [["b"], ["b", "d"], ["b", "c", "d"], ["a", "b", "c", "d"]]
