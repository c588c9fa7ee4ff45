"""The group's connection to one worker: its gRPC stub, liveness checks and process control."""

from __future__ import annotations

import time
from typing import Protocol

import grpc

from ...proto import worker_pb2 as pb
from ...proto import worker_pb2_grpc
from ..utils.lifetime import track_call

PING_TIMEOUT = 5.0  # seconds without an answer after which a worker counts as hung
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class WorkerGroupError(RuntimeError):
    """The group failed: a worker died, or a call to one failed."""


class Life(Protocol):
    """Control of a worker's lifetime: of a child process, or of a remote worker."""

    @property
    def pid(self) -> int:
        """The worker's process id on its machine."""

    def check_ended(self) -> None:
        """Raise `WorkerGroupError` if the worker is known to have exited."""

    def kill(self) -> None:
        """End the worker at once, without waiting."""

    def ask_to_end(self) -> None:
        """Ask the worker to exit, without waiting."""

    def disown(self) -> None:
        """Release what would keep the worker alive after its engine. Called in a forked process."""

    def wait_ended(self, deadline: float) -> None:
        """Wait for the exit until `deadline` (time.monotonic()), then kill the worker."""


class WorkerLink:
    """The worker of one rank in one epoch of the group."""

    def __init__(self, rank: int, epoch: int, channel: grpc.Channel, life: Life) -> None:
        self.rank, self.epoch = rank, epoch
        self.channel, self.life = channel, life
        self.stub = worker_pb2_grpc.WorkerStub(channel)
        self._ping: grpc.Future | None = None  # the latest
        self._silent_since: float | None = None  # time of the first unanswered ping
        self._checked_at = 0.0

    def __str__(self) -> str:
        return f"the worker of rank {self.rank} ({self.life})"

    def check_ended(self) -> None:
        """Raise `WorkerGroupError` if the worker has exited."""
        try:
            self.life.check_ended()
        except WorkerGroupError as error:
            raise WorkerGroupError(f"{self} {error}") from None

    def check_answers(self) -> None:
        """Send a ping; raise `WorkerGroupError` if there was no answer for `PING_TIMEOUT`.

        A worker answers pings while a step runs, but not when it is stopped or disconnected.
        """
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
        if self._silent_since is None or now - self._checked_at > PING_TIMEOUT:
            self._silent_since = now  # without checks in between, the silence proves nothing
        self._checked_at = now
        request = pb.PingRequest(epoch=self.epoch)
        self._ping = track_call(self.stub.Ping.future(request, timeout=PING_TIMEOUT))

    def heard(self) -> None:
        """Record that the worker answered another call."""
        self._silent_since = None

    def _is_silent(self, now: float) -> bool:
        checked_recently = now - self._checked_at <= PING_TIMEOUT
        since = self._silent_since
        return since is not None and checked_recently and now - since > PING_TIMEOUT

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise WorkerGroupError(f"{self} is of epoch {epoch} and not {self.epoch}")


def _timed_out(error: BaseException) -> bool:
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
