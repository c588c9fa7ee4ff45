"""Waiting for workers without missing that one of them has ended."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc

from ..errors import ConfigError
from ..runner.batch import InputBatch
from .link import WorkerGroupError, WorkerLink

MIN_BOUND, BOUND_FACTOR = 30.0, 20.0  # seconds, and times what a step should take


class StepBound:
    """How long a step may take, from its work and from what steps have taken.

    Far more than it should: a first step compiles, pages weights in, or encodes for seconds.
    """

    def __init__(self) -> None:
        self._rate = 0.05  # seconds for a unit of work, of the slowest steps lately

    def seconds(self, work: float) -> float:
        return MIN_BOUND + BOUND_FACTOR * self._rate * work

    def learn(self, work: float, seconds: float) -> None:
        self._rate = max(0.9 * self._rate, seconds / work)


def work_of(batch: InputBatch) -> float:
    """Tokens computed, patches encoded, and tokens read."""
    patches = sum(math.prod(task.grid_thw) for task in batch.encode if task.embeds is None)
    return 1 + batch.token_ids.size + patches + int(batch.context_lens.sum()) / 64


ALIVE_CHECK = 0.5  # seconds between two looks at the workers while waiting for an answer
CLOSING = "the engine closes"
TOO_LONG = "a step took far longer than its work should"


class Watch:
    """Over a group's workers, in one of its lives."""

    def __init__(self, workers: Sequence[WorkerLink], given_up: threading.Event) -> None:
        """`workers`: may still grow. `given_up`: see `WorkerGroup.give_up`."""
        self._workers, self._given_up = workers, given_up
        self.is_loaded = False  # they answer pings, and have work that is worth finishing

    def check_alive(self) -> None:
        """Raises `WorkerGroupError` when a worker has ended, or has not answered for long; and, as
        long as they load, when nobody wants them any more."""
        for worker in self._workers:
            worker.check_ended()
        if self.is_loaded:
            for worker in self._workers:
                worker.check_answers()
        elif self._given_up.is_set():
            raise WorkerGroupError(CLOSING)

    def next_of(
        self, source: queue.SimpleQueue[Any], deadline: float = math.inf, late: str = TOO_LONG
    ) -> Any:
        """The next of a queue. Raises `WorkerGroupError` as `check_alive` does, and with the text
        `late` after the deadline, on the monotonic clock."""
        while True:
            try:
                return source.get(timeout=ALIVE_CHECK)
            except queue.Empty:
                self.check_alive()
            if time.monotonic() > deadline:
                raise WorkerGroupError(late)

    def fault(self, error: Exception, is_mendable: bool = False) -> Exception:
        """What a failed call means: the user's to mend, a dead worker, or a fault in a step."""
        if not isinstance(error, grpc.RpcError):
            return WorkerGroupError(f"a worker failed: {error}")
        if is_mendable and error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            return ConfigError(error.details())
        # A rank that died is the cause, also where another's broken connection told of it first;
        # its socket closes a moment before the process can be waited for.
        deadline = time.monotonic() + ALIVE_CHECK
        while time.monotonic() < deadline:
            try:
                self.check_alive()
            except WorkerGroupError as dead:
                return dead
            time.sleep(0.02)
        return WorkerGroupError(f"a worker failed: {error.details()}")
