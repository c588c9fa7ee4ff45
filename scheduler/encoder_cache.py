"""Accounting of the embeddings that the workers cache: units, sizes and references.

The workers hold the tensors and delete them as instructed by each step plan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from .request import EncodeUnit, UnitKey


@dataclass
class _Entry:
    num_tokens: int
    holders: set[str] = field(default_factory=set)  # ids of requests with tokens left to compute


class EncoderCache:
    """LRU cache of at most `capacity` image tokens; only unreferenced units are evicted.

    A request references a unit from the step that computes its first token to the step that
    computes its last. While it references one, it can always compute the rest of it, which takes
    no further capacity; only then does it need the next. So requests cannot deadlock on capacity.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[UnitKey, _Entry] = OrderedDict()  # least recently used first
        self.num_tokens = 0  # of all entries
        self._num_held = 0  # tokens of entries with a holder
        self._evicted: list[UnitKey] = []  # not yet sent to the workers
        self.num_found = self.num_added = 0  # cache hits and misses, once per request and unit

    def __contains__(self, key: UnitKey) -> bool:
        return key in self._entries

    def room(self) -> int:
        """Return the tokens that can be added after evicting unreferenced units."""
        return self.capacity - self._num_held

    def tokens_to_hold(self, unit: EncodeUnit) -> int:
        """Return by how much one more reference to `unit` reduces `room`."""
        entry = self._entries.get(unit.key)
        return 0 if entry is not None and entry.holders else unit.num_tokens

    def hold(self, unit: EncodeUnit, request_id: str) -> bool:
        """Add a request's reference to a unit.

        Returns True if the unit is new and must be encoded now. The caller ensures that `room`
        suffices.
        """
        entry = self._entries.get(unit.key)
        is_new = entry is None
        if entry is None:
            self.num_added += 1
            self._evict(unit.num_tokens)
            entry = self._entries[unit.key] = _Entry(unit.num_tokens)
            self.num_tokens += unit.num_tokens
        elif request_id not in entry.holders:
            self.num_found += 1
        if not entry.holders:
            self._num_held += entry.num_tokens
        entry.holders.add(request_id)
        self._entries.move_to_end(unit.key)
        return is_new

    def release(self, key: UnitKey, request_id: str) -> None:
        """Drop a request's reference to a unit, if it has one."""
        entry = self._entries.get(key)
        if entry is None or request_id not in entry.holders:
            return
        entry.holders.remove(request_id)
        if not entry.holders:
            self._num_held -= entry.num_tokens

    def lose(self, key: UnitKey) -> None:
        """Drop a unit that a worker lacks, from all workers, so that it is encoded again."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_tokens -= entry.num_tokens
            self._num_held -= entry.num_tokens if entry.holders else 0
            self._evicted.append(key)

    def forget(self, key: UnitKey) -> None:
        """Drop an unreferenced unit whose embedding may be invalid."""
        entry = self._entries.get(key)
        if entry is not None and not entry.holders:
            self.lose(key)

    def reset(self) -> None:
        """Empty the cache after a worker restart. No request may reference a unit."""
        assert self._num_held == 0
        self._entries.clear()
        self._evicted.clear()
        self.num_tokens = 0

    def take_evicted(self) -> tuple[UnitKey, ...]:
        """Return the units evicted since the last call.

        The workers delete them before they encode.
        """
        evicted, self._evicted = self._evicted, []
        return tuple(evicted)

    def _evict(self, num_tokens: int) -> None:
        """Evict unreferenced units until `num_tokens` fit."""
        unused = (key for key, entry in self._entries.items() if not entry.holders)
        victims: list[UnitKey] = []
        excess = self.num_tokens + num_tokens - self.capacity
        while excess > 0:
            key = next(unused)
            victims.append(key)
            excess -= self._entries[key].num_tokens
        for key in victims:
            self.num_tokens -= self._entries.pop(key).num_tokens
        self._evicted.extend(victims)

    def check_integrity(self, held: Mapping[str, set[UnitKey]]) -> None:
        """Assert that sums are right and that holders are those in `held`."""
        entries = self._entries.values()
        assert self.num_tokens == sum(e.num_tokens for e in entries) <= self.capacity
        assert self._num_held == sum(e.num_tokens for e in entries if e.holders)
        for key, entry in self._entries.items():
            for request_id in entry.holders:
                assert key in held.get(request_id, ()), f"{request_id} holds {key} without need"
