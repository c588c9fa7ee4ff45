"""Allocates worker-side slots holding each request's token history for penalties.

A slot persists between steps, so the history is sent once and not with every token. The engine
assigns slots and refills them after a worker restart.
"""

from __future__ import annotations

from ...scheduler.request import Request, RequestStatus


class SamplingSlots:
    """Slot allocator. There are as many slots as concurrent requests with a penalty.

    A finished or preempted request keeps its slot until another request needs it.
    """

    def __init__(self) -> None:
        self._slots: dict[Request, int] = {}
        self._num_tokens: dict[Request, int] = {}  # in the slot, once all steps in flight are done
        self._free: list[int] = []
        self._num_slots = 0

    def place(self, request: Request, start: int, count: int) -> tuple[int, bool]:
        """Return the slot for a sampling row that computes tokens [start, start + count).

        Also returns whether the slot already has all tokens except the row's own.
        """
        kept = count == 1 and self._num_tokens.get(request) == start
        if request not in self._slots:
            self._slots[request] = self._new_slot()
        self._num_tokens[request] = start + count
        return self._slots[request], kept

    def reset(self) -> None:
        """Mark all slots as empty after a worker restart."""
        self._num_tokens.clear()

    def _new_slot(self) -> int:
        if not self._free:
            for request in [r for r in self._slots if r.status is not RequestStatus.RUNNING]:
                self._free.append(self._slots.pop(request))
                self._num_tokens.pop(request, None)
        if not self._free:
            self._free.append(self._num_slots)
            self._num_slots += 1
        return self._free.pop()
