"""Counts the embeddings that workers keep: which units, how large, who needs them still.

The one owner of that truth: workers hold the tensors and forget them when told so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from .request import EncodeUnit, UnitKey


@dataclass
class _Entry:
    num_tokens: int
    holders: set[str] = field(default_factory=set)  # request_ids that have tokens left to compute


class EncoderCache:
    """At most `capacity` image tokens. What nobody holds stays until its room is needed, the
    longest unused going first.

    A request holds a unit only from the step that computes its first token to the one that
    computes its last. While it holds one it can compute the rest of it, which takes no new room,
    and then lets go; only then may it want the next. So holders never wait for each other.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[UnitKey, _Entry] = OrderedDict()  # longest unused first
        self.num_tokens = 0  # of all entries
        self._num_held = 0  # tokens of entries with a holder
        self._evicted: list[UnitKey] = []  # not yet told to the workers
        self.num_found = self.num_added = 0  # times a request came to need a unit: it was there
        # already, or had to be encoded

    def __contains__(self, key: UnitKey) -> bool:
        return key in self._entries

    def room(self) -> int:
        """Tokens that can be added, evicting what nobody holds."""
        return self.capacity - self._num_held

    def tokens_to_hold(self, unit: EncodeUnit) -> int:
        """What `room` would lose if `unit` were held by one more request."""
        entry = self._entries.get(unit.key)
        return 0 if entry is not None and entry.holders else unit.num_tokens

    def hold(self, unit: EncodeUnit, request_id: str) -> bool:
        """Marks a unit as needed by a request. True when it is new and must be encoded now.

        The caller has seen to it that `room` suffices.
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
        """A request needs a unit no longer; nothing happens where it did not hold it."""
        entry = self._entries.get(key)
        if entry is None or request_id not in entry.holders:
            return
        entry.holders.remove(request_id)
        if not entry.holders:
            self._num_held -= entry.num_tokens

    def lose(self, key: UnitKey) -> None:
        """A worker does not have a unit: whoever needs it plans it anew, and no worker keeps it."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_tokens -= entry.num_tokens
            self._num_held -= entry.num_tokens if entry.holders else 0
            self._evicted.append(key)

    def forget(self, key: UnitKey) -> None:
        """What a unit's embedding holds is in doubt: who comes is to have it encoded anew."""
        entry = self._entries.get(key)
        if entry is not None and not entry.holders:
            self.lose(key)

    def reset(self) -> None:
        """All workers are new and keep nothing. No request may hold a unit."""
        assert self._num_held == 0
        self._entries.clear()
        self._evicted.clear()
        self.num_tokens = 0

    def take_evicted(self) -> tuple[UnitKey, ...]:
        """What was evicted since the last call; workers are to forget it before they encode."""
        evicted, self._evicted = self._evicted, []
        return tuple(evicted)

    def _evict(self, num_tokens: int) -> None:
        """Makes room for `num_tokens`."""
        unused = (key for key, entry in self._entries.items() if not entry.holders)
        going: list[UnitKey] = []
        excess = self.num_tokens + num_tokens - self.capacity
        while excess > 0:
            key = next(unused)
            going.append(key)
            excess -= self._entries[key].num_tokens
        for key in going:
            self.num_tokens -= self._entries.pop(key).num_tokens
        self._evicted.extend(going)

    def check_integrity(self, held: Mapping[str, set[UnitKey]]) -> None:
        """Sums are right, the capacity holds, and holders are just those in `held`."""
        entries = self._entries.values()
        assert self.num_tokens == sum(e.num_tokens for e in entries) <= self.capacity
        assert self._num_held == sum(e.num_tokens for e in entries if e.holders)
        for key, entry in self._entries.items():
            for request_id in entry.holders:
                assert key in held.get(request_id, ()), f"{request_id} holds {key} for nothing"
