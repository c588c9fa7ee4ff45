"""Start and control local workers: child processes that listen on Unix sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from ..utils.cores import num_cores
from ..utils.lifetime import start_tied
from .link import UNLIMITED, WorkerGroupError, WorkerLink

WORKER_MODULE = "octavo.engine.worker.worker"
# OpenMP threads spin for about 30 microseconds before they sleep. A step has hundreds of parallel
# regions; waking sleeping threads for each made a step 1.14 times as long (2B model, two cores).
SPIN_COUNT = "10000"
# Maximum entries in the caches of compiled kernels in oneDNN and in torch's layer over it, 0.3 to
# 0.6 MB each. With their default of 1,024, a worker grew by hundreds of MB; a model needs about 150
# (`kernels.linear.in_few_shapes`).
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}


def start_worker(rank: int, socket: Path, num_ranks: int, epoch: int, shared: int) -> WorkerLink:
    """Start a worker on a Unix socket, without waiting until it listens.

    `shared`: file descriptor of `shared_memory`.
    """
    process = ChildProcess(_start(socket, num_ranks, shared))
    return WorkerLink(rank, epoch, connect(socket), process)


@contextlib.contextmanager
def shared_memory() -> Iterator[int]:
    """Yield the descriptor of an unnamed file for memory that the ranks of one machine share.

    The memory is freed when the last process that has it open exits.
    """
    file = os.memfd_create("octavo-ranks")
    try:
        yield file
    finally:
        os.close(file)


class ChildProcess:
    """`Life` of a local worker, which exits when its standard input closes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def __str__(self) -> str:
        return f"pid {self.pid}"

    def check_ended(self) -> None:
        code = self._process.poll()
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            raise WorkerGroupError(how)

    def kill(self) -> None:
        self._process.kill()

    def ask_to_end(self) -> None:
        """Close the worker's standard input."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()

    def disown(self) -> None:
        self.ask_to_end()

    def wait_ended(self, deadline: float) -> None:
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def connect(socket: Path) -> grpc.Channel:
    """Return a channel to a worker on a Unix socket."""
    # The default back-off of a second would dominate the start time, since a local connection
    # takes milliseconds.
    backoff = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
    return grpc.insecure_channel(f"unix:{socket}", options=[*UNLIMITED, *backoff])


def _start(socket: Path, num_ranks: int, shared: int) -> subprocess.Popen[bytes]:
    """Start the process. `-P` keeps our folders (`kernels`, `proto`) from shadowing packages."""
    threads = max(1, num_cores() // num_ranks)
    defaults = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": SPIN_COUNT, **KERNEL_CACHES}
    env = {**defaults, **os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-P", "-m", WORKER_MODULE, "--socket", str(socket)]
    command += ["--shared", str(shared)]
    # With its own session, Ctrl-C in a terminal reaches only the engine, which closes the group.
    more: dict[str, Any] = {"env": env, "start_new_session": True, "pass_fds": [shared]}
    return start_tied(command, signal.SIGCONT, **more)  # see `end_with_parent`
