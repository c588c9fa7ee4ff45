"""Wait for workers' replies and detect dead, hung and slow workers meanwhile."""

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

MIN_BOUND, BOUND_FACTOR = 30.0, 20.0  # seconds; multiple of a step's expected time


class StepBound:
    """Maximum time of a step, estimated from its work and the time of recent steps.

    The bound is generous, because a first step may compile kernels or page weights in.
    """

    def __init__(self) -> None:
        self._rate = 0.05  # seconds per unit of work in the slowest recent steps

    def seconds(self, work: float) -> float:
        """Return the maximum time of a step."""
        return MIN_BOUND + BOUND_FACTOR * self._rate * work

    def learn(self, work: float, seconds: float) -> None:
        """Update the estimate with a measured step."""
        self._rate = max(0.9 * self._rate, seconds / work)


def work_of(batch: InputBatch) -> float:
    """Estimate the work of a step from its computed tokens, encoded patches and context tokens."""
    patches = sum(math.prod(task.grid_thw) for task in batch.encode if task.embeds is None)
    return 1 + batch.token_ids.size + patches + int(batch.context_lens.sum()) / 64


ALIVE_CHECK = 0.5  # seconds between two checks of the workers while waiting
CLOSING = "the engine is closing"
TOO_LONG = "a step took far longer than expected for its work"


class Watch:
    """Watches a group's workers during one epoch."""

    def __init__(self, workers: Sequence[WorkerLink], given_up: threading.Event) -> None:
        """Watch `workers`, which may still grow. `given_up`: see `WorkerGroup.give_up`."""
        self._workers, self._given_up = workers, given_up
        self.is_loaded = False  # workers answer pings, and steps complete even after `given_up`

    def check_alive(self) -> None:
        """Raise `WorkerGroupError` if a worker has exited or, once loaded, does not answer pings.

        While the workers load, it is also raised if the group is closing.
        """
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
        """Wait for the next item of a queue and return it.

        Raises `WorkerGroupError` like `check_alive`, and with the text `late` if `deadline`
        (time.monotonic()) has passed.
        """
        while True:
            try:
                return source.get(timeout=ALIVE_CHECK)
            except queue.Empty:
                self.check_alive()
            if time.monotonic() > deadline:
                raise WorkerGroupError(late)

    def fault(self, error: Exception, may_be_config_error: bool = False) -> Exception:
        """Return the cause of a failed call: invalid configuration, a dead worker or its error."""
        if not isinstance(error, grpc.RpcError):
            return WorkerGroupError(f"a worker failed: {error}")
        if may_be_config_error and error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            return ConfigError(error.details())
        # If a rank died, it is the cause, even if another rank's broken connection was reported
        # first. A socket closes slightly before its process can be waited for, so keep checking.
        deadline = time.monotonic() + ALIVE_CHECK
        while time.monotonic() < deadline:
            try:
                self.check_alive()
            except WorkerGroupError as dead:
                return dead
            time.sleep(0.02)
        return WorkerGroupError(f"a worker failed: {error.details()}")
