"""Run steps in the order of their ids, each once, in whatever order their messages arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

ORDER_TIMEOUT = 1.0  # seconds that a step waits for the previous one to arrive

T = TypeVar("T")


class MissedStep(RuntimeError):
    """A step arrived without the previous one; both must be sent again."""


class StepSequence(Generic[T]):
    """Runs all steps on one thread, because each computing thread has its own OpenMP threads.

    A step that arrives again, because the connection broke before its reply, is not run again.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._moved = threading.Condition()
        self._submitted: dict[int, Future[T]] = {}  # the latest two steps
        self.latest = 0  # id of the latest step submitted; 0 before the first

    def submit(self, previous: int, step_id: int, run: Callable[[], T]) -> Future[T]:
        """Schedule `run` after the step `previous` and return its future.

        Raises `MissedStep` if the step `previous` does not arrive within `ORDER_TIMEOUT`.
        """
        with self._moved:
            self._moved.wait_for(
                lambda: step_id in self._submitted or self.latest == previous, ORDER_TIMEOUT
            )
            if step_id in self._submitted:
                return self._submitted[step_id]
            if self.latest != previous:
                raise MissedStep(f"step {previous} was missed; the latest is {self.latest}")
            before = self._submitted.get(previous)
            self._submitted = {} if before is None else {previous: before}
            self._submitted[step_id] = future = self._thread.submit(_after, before, run)
            self.latest = step_id
            self._moved.notify_all()
        return future


def _after(before: Future[T] | None, run: Callable[[], T]) -> T:
    """Run a step. Raises `RuntimeError` if the previous step failed, since it depends on it."""
    if before is not None and (error := before.exception()) is not None:
        raise RuntimeError("the previous step failed") from error
    return run()
