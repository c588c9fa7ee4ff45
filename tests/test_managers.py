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
    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(7, 4)
        self.tables: dict[str, array[int]] = {name: array("i") for name in "abc"}

    @rule(name=NAMES, tokens=st.integers(0, 40))
    def grow(self, name: str, tokens: int) -> None:
        table = self.tables[name]
        before = list(table)
        fits = -(-tokens // 4) - len(before) <= self.manager.num_free
        assert self.manager.grow(table, tokens) == fits
        assert list(table[: len(before)]) == before
        if fits:
            assert len(table) == max(len(before), -(-tokens // 4))
        else:
            assert list(table) == before

    @rule(name=NAMES)
    def free(self, name: str) -> None:
        self.manager.free(self.tables[name])
        assert not self.tables[name]

    @invariant()
    def whole(self) -> None:
        self.manager.check_integrity(self.tables.values())
        assert self.manager.num_free == 7 - sum(map(len, self.tables.values()))


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
        cost = self.cache.held_tokens(unit)
        assert cost == (0 if self.holders[key] else self.SIZES[key])
        if cost > self.cache.room():
            return
        is_new = self.cache.hold(unit, name)
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
    max_examples=60, stateful_step_count=40, deadline=None
)
TestBlocks = Blocks.TestCase
TestEncoder = Encoder.TestCase
