"""One rank, as its group sees it: how it is called, watched and ended."""

from __future__ import annotations

import time
from typing import Protocol

import grpc

from ...proto import worker_pb2 as pb
from ...proto import worker_pb2_grpc
from ..utils.lifetime import track_call

PING_TIMEOUT = 5.0  # seconds without an answer after which a worker is taken to hang
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class WorkerGroupError(RuntimeError):
    """The group cannot go on: a worker died, or a call to one failed."""


class Life(Protocol):
    """What holds a worker: a process of ours, or an engine's hold on one of another machine."""

    @property
    def pid(self) -> int:
        """Of the worker, where it runs."""

    def check_ended(self) -> None:
        """Raises `WorkerGroupError` when it is known to have ended."""

    def kill(self) -> None:
        """Ends it as soon as may be; waits for nothing."""

    def ask_to_end(self) -> None: ...

    def disown(self) -> None:
        """In a forked process: release what would keep the worker from ending with its engine."""

    def wait_ended(self, deadline: float) -> None:
        """Waits until `deadline` on the monotonic clock, then kills it."""


class WorkerLink:
    """The worker of a rank, in the group's life `epoch`."""

    def __init__(self, rank: int, epoch: int, channel: grpc.Channel, life: Life) -> None:
        self.rank, self.epoch = rank, epoch
        self.channel, self.life = channel, life
        self.stub = worker_pb2_grpc.WorkerStub(channel)
        self._ping: grpc.Future | None = None  # the latest
        self._silent_since: float | None = None  # when the first ping was sent that has no answer
        self._looked_at = 0.0

    def __str__(self) -> str:
        return f"the worker of rank {self.rank} ({self.life})"

    def check_ended(self) -> None:
        """Raises `WorkerGroupError` when the worker has ended."""
        try:
            self.life.check_ended()
        except WorkerGroupError as error:
            raise WorkerGroupError(f"{self} {error}") from None

    def check_answers(self) -> None:
        """Raises `WorkerGroupError` when pings have had no answer for long, and sends the next.
        A worker answers them while a step runs, but not one that is stopped or cut off."""
        now = time.monotonic()
        if self._ping is not None:
            if not self._ping.done():
                return
            error = self._ping.exception()
            if error is None:
                self._silent_since = None
                self._check_epoch(self._ping.result().epoch)
            elif _timed_out(error) or self._is_silent(now):
                raise WorkerGroupError(f"{self} did not answer for {PING_TIMEOUT:.0f} s")
        if self._silent_since is None or now - self._looked_at > PING_TIMEOUT:
            self._silent_since = now  # nobody looked for long, so nothing is known of that time
        self._looked_at = now
        request = pb.PingRequest(epoch=self.epoch)
        self._ping = track_call(self.stub.Ping.future(request, timeout=PING_TIMEOUT))

    def heard(self) -> None:
        """It has answered something."""
        self._silent_since = None

    def _is_silent(self, now: float) -> bool:
        looked_lately = now - self._looked_at <= PING_TIMEOUT
        since = self._silent_since
        return since is not None and looked_lately and now - since > PING_TIMEOUT

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise WorkerGroupError(f"{self} is of epoch {epoch} and not {self.epoch}")


def _timed_out(error: BaseException) -> bool:
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
