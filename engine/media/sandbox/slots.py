"""A first-come, first-served semaphore for requests."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from threading import Condition

from ..task import MediaTask


class FairSlots:
    """A semaphore of `count` slots, acquired in FIFO order. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._num_free = count
        self._waiting: deque[object] = deque()
        self._changed = Condition()
        self._is_closed = False

    def acquire(self, task: MediaTask | None, field: str) -> None:
        """Wait for a slot.

        Raises `InputError` if the task is cancelled or its time is up, and `RuntimeError` if the
        slots are closed.
        """
        with task.watched(self._wake) if task is not None else nullcontext():
            ticket = object()
            with self._changed:
                self._waiting.append(ticket)
                try:
                    while not self._is_next(ticket):
                        self._changed.wait(task.seconds_left(field) if task is not None else None)
                    self._num_free -= 1
                finally:
                    self._waiting.remove(ticket)
                    self._changed.notify_all()

    def _is_next(self, ticket: object) -> bool:
        if self._is_closed:
            raise RuntimeError("the pool of media decoders is closed")
        return self._num_free > 0 and self._waiting[0] is ticket

    def release(self) -> None:
        with self._changed:
            self._num_free += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Make all waiting and future calls of `acquire` fail."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
