"""One rank's process, as its group sees it: started, reached, watched, ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import grpc

from ...proto import worker_pb2 as pb
from ...proto import worker_pb2_grpc
from .worker import UNLIMITED

PING_TIMEOUT = 5.0  # seconds without an answer after which a worker is taken to hang
WORKER_MODULE = "octavo.engine.worker.worker"
# How long a thread looks out for the next part of a step before it sleeps: some 30 microseconds.
# A step has hundreds of parts; to be woken for each made it 1.14 times as long (2B, two cores).
SPIN_COUNT = "10000"


class WorkerGroupError(RuntimeError):
    """The group cannot go on: a worker died, or a call to one failed."""


class WorkerProcess:
    """A worker that was started on the Unix socket `socket`; it listens a while later."""

    def __init__(self, rank: int, socket: Path, num_ranks: int, epoch: int) -> None:
        self.rank, self.epoch = rank, epoch
        self._process = _start(socket, num_ranks)
        self.channel = connect(socket)
        self.stub = worker_pb2_grpc.WorkerStub(self.channel)
        self._ping: grpc.Future | None = None  # the latest
        self._silent_since: float | None = None  # when the first ping was sent that has no answer
        self._looked_at = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    def __str__(self) -> str:
        return f"the worker of rank {self.rank} (pid {self.pid})"

    def check_ended(self) -> None:
        """Raises `WorkerGroupError` when the process has ended."""
        code = self._process.poll()
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            raise WorkerGroupError(f"{self} {how}")

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
        self._ping = self.stub.Ping.future(pb.PingRequest(epoch=self.epoch), timeout=PING_TIMEOUT)

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

    def kill(self) -> None:
        self._process.kill()

    def ask_to_end(self) -> None:
        """Closes the pipe whose end it waits for."""
        self.channel.close()
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()

    def wait_ended(self, deadline: float) -> None:
        """Waits until `deadline` on the monotonic clock, then kills it."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _timed_out(error: BaseException) -> bool:
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def connect(socket: Path) -> grpc.Channel:
    # A local socket is there in milliseconds; the default back-off of a second would be most of
    # the start.
    backoff = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
    return grpc.insecure_channel(f"unix:{socket}", options=[*UNLIMITED, *backoff])


def _start(socket: Path, num_ranks: int) -> subprocess.Popen[bytes]:
    """`-P`: our own folder names (`kernels`, `proto`) must not shadow a user's packages."""
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-P", "-m", WORKER_MODULE, "--socket", str(socket)]
    # Its own session: Ctrl-C in a terminal reaches the engine alone, which closes the group.
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, start_new_session=True)
