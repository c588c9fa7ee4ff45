"""Workers that the group starts itself: processes on this machine, reached by a Unix socket."""

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
# How long a thread looks out for the next part of a step before it sleeps: some 30 microseconds.
# A step has hundreds of parts; to be woken for each made it 1.14 times as long (2B, two cores).
SPIN_COUNT = "10000"
# Compiled code that oneDNN and torch's layer over it keep, 0.3 to 0.6 MB an entry. Their default of
# 1,024 each let a worker grow by hundreds of MB; a model's products take some 150 entries
# (`kernels.linear.in_few_shapes`).
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}


def start_worker(rank: int, socket: Path, num_ranks: int, epoch: int, shared: int) -> WorkerLink:
    """Starts a worker on the Unix socket `socket`; it listens a while later. `shared`: see
    `shared_memory`."""
    process = ChildProcess(_start(socket, num_ranks, shared))
    return WorkerLink(rank, epoch, connect(socket), process)


@contextlib.contextmanager
def shared_memory() -> Iterator[int]:
    """An open file for the memory of ranks on one machine. It has no name, and is gone when all
    that have it open are."""
    file = os.memfd_create("octavo-ranks")
    try:
        yield file
    finally:
        os.close(file)


class ChildProcess:
    """It ends when its standard input closes. See `Life`."""

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
        """Closes the pipe whose end it waits for."""
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
    # A local socket is there in milliseconds; the default back-off of a second would be most of
    # the start.
    backoff = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
    return grpc.insecure_channel(f"unix:{socket}", options=[*UNLIMITED, *backoff])


def _start(socket: Path, num_ranks: int, shared: int) -> subprocess.Popen[bytes]:
    """`-P`: our own folder names (`kernels`, `proto`) must not shadow a user's packages."""
    threads = max(1, num_cores() // num_ranks)
    ours = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": SPIN_COUNT, **KERNEL_CACHES}
    env = {**ours, **os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-P", "-m", WORKER_MODULE, "--socket", str(socket)]
    command += ["--shared", str(shared)]
    # Its own session: Ctrl-C in a terminal reaches the engine alone, which closes the group.
    more: dict[str, Any] = {"env": env, "start_new_session": True, "pass_fds": [shared]}
    return start_tied(command, signal.SIGCONT, **more)  # it reads the end of its standard input
