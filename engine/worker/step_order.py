"""Runs steps in the order of their numbers, whatever order they come in, and each once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

ORDER_TIMEOUT = 1.0  # seconds that a step waits for the one before it to come

T = TypeVar("T")


class MissedStep(RuntimeError):
    """A step came, but not the one before it: both are to be sent again."""


class StepSequence(Generic[T]):
    """All steps run on one thread, always the same: each thread that computes has OpenMP threads
    of its own.

    A step that comes again, since the connection broke before its answer, is not run again.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._moved = threading.Condition()
        self._taken: dict[int, Future[T]] = {}  # the latest two
        self.latest = 0  # the latest step taken; 0 before the first

    def submit(self, previous: int, step_id: int, run: Callable[[], T]) -> Future[T]:
        """What `run` gives, once the step `previous` has run. Raises `MissedStep` where that has
        not come."""
        with self._moved:
            self._moved.wait_for(
                lambda: step_id in self._taken or self.latest == previous, ORDER_TIMEOUT
            )
            if step_id in self._taken:
                return self._taken[step_id]
            if self.latest != previous:
                raise MissedStep(f"step {previous} was missed; the latest is {self.latest}")
            before = self._taken.get(previous)
            self._taken = {} if before is None else {previous: before}
            self._taken[step_id] = future = self._thread.submit(_after, before, run)
            self.latest = step_id
            self._moved.notify_all()
        return future


def _after(before: Future[T] | None, run: Callable[[], T]) -> T:
    """A step whose forerunner failed has nothing to go on from."""
    if before is not None and (error := before.exception()) is not None:
        raise RuntimeError("the step before it failed") from error
    return run()
