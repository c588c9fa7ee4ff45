"""Where the workers keep what a request's penalties look at.

A slot has all tokens that its request has had, from step to step, so that they travel once and not
with each token. The engine says which slot is whose and from what it is to be filled anew; so
nothing is lost with a worker.
"""

from __future__ import annotations

from ...scheduler.request import Request, RequestStatus


class SamplingSlots:
    """As many slots as requests with a penalty run at once. One that has ended or was preempted
    keeps its slot until another needs it."""

    def __init__(self) -> None:
        self._slots: dict[Request, int] = {}
        self._num_tokens: dict[Request, int] = {}  # that its slot has seen, once all steps are done
        self._free: list[int] = []
        self._num_slots = 0

    def place(self, request: Request, start: int, count: int) -> tuple[int, bool]:
        """The slot for a row that computes tokens [start, start + count) and samples; and whether
        it has all before those already, so that the row's own token is all that it lacks."""
        kept = count == 1 and self._num_tokens.get(request) == start
        if request not in self._slots:
            self._slots[request] = self._new_slot()
        self._num_tokens[request] = start + count
        return self._slots[request], kept

    def reset(self) -> None:
        """The workers are new: every slot is to be filled anew."""
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
