"""The worker group: starts one process a rank and fans each step out to them over gRPC."""

from __future__ import annotations

import itertools
import logging
import math
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from ...proto import worker_pb2 as pb
from ...proto import worker_pb2_grpc
from ..config import ConfigError, EngineConfig
from ..failpoint import failpoint
from ..runner.batch import BatchResult, InputBatch
from .bound import StepBound
from .wire import pack_steps, unpack_result
from .worker import UNLIMITED

log = logging.getLogger("octavo.group")

START_TIMEOUT = 120.0  # seconds for a worker's socket to answer: imports on a cold disk
ALIVE_CHECK = 0.5  # seconds between two looks at the processes while waiting for an answer
PING_TIMEOUT = 5.0  # seconds without an answer after which a worker is taken to hang
EXIT_TIMEOUT = 5.0  # seconds for a worker to end when asked

_epochs = itertools.count(1)


class WorkerGroupError(RuntimeError):
    """The group cannot go on: a worker died, or a call to one failed."""


@dataclass(frozen=True)
class GroupMemory:
    """What loading measured; bytes are of the rank with the least room."""

    weight_bytes: int
    total_bytes: int
    free_bytes: int
    kv_block_bytes: int
    dtype: str
    device: str


class WorkerGroup:
    """`tensor_parallel_size` workers that step together. Not thread-safe: one caller at a time."""

    def __init__(
        self, config: EngineConfig, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Starts the workers and loads the weights.

        Raises `ConfigError` for what the user can mend and `WorkerGroupError` for a fault.
        """
        self.size = config.tensor_parallel_size
        self._config = config
        self._num_blocks = 0
        self._bound = StepBound()
        self._launch(on_progress or (lambda done, total: None))

    def _launch(self, on_progress: Callable[[int, int], None]) -> None:
        self.epoch = next(_epochs)
        self._dir = Path(tempfile.mkdtemp(prefix="octavo-"))  # mode 0700: ours alone
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[grpc.Channel] = []
        self._pings: list[grpc.Future | None] = []  # the latest of each rank, once they are loaded
        try:
            sockets = [self._dir / f"rank{rank}.sock" for rank in range(self.size)]
            self._processes = [_start_worker(socket, self.size) for socket in sockets]
            self._channels = [_connect(socket) for socket in sockets]
            self._wait_until_listening()
            self._stubs = [worker_pb2_grpc.WorkerStub(channel) for channel in self._channels]
            self.memory = self._load(self._config, on_progress)
            self._pings = [None] * self.size
        except BaseException:
            self.close()
            raise

    def restart(self) -> None:
        """Ends what is left of the workers and starts new ones, under a new epoch, with a KV cache
        of the same size and nothing in it. Raises `WorkerGroupError` if those fail too."""
        for process in self._processes:
            process.kill()
        self.close()
        self._launch(lambda done, total: None)
        self.allocate(self._num_blocks)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids in rank order."""
        return tuple(process.pid for process in self._processes)

    def allocate(self, num_blocks: int) -> None:
        """Makes the KV cache on every rank."""
        self._num_blocks = num_blocks
        request = pb.AllocateRequest(epoch=self.epoch, num_blocks=num_blocks)
        self._gather([stub.Allocate.future(request) for stub in self._stubs])

    def step(self, batch: InputBatch, step_id: int) -> BatchResult:
        """Runs a step on all ranks; the answer is rank 0's, which sampled."""
        requests = pack_steps(batch, self.epoch, step_id, self.size)
        failpoint("group.sends")
        start = time.monotonic()
        calls = [
            stub.Step.future(request) for stub, request in zip(self._stubs, requests, strict=True)
        ]
        failpoint("group.sent")
        replies = self._gather(calls, start + self._bound.seconds(batch))
        self._bound.learn(batch, time.monotonic() - start)
        for reply in replies:
            if (reply.epoch, reply.step_id) != (self.epoch, step_id):
                raise WorkerGroupError(
                    f"a worker answered step {reply.step_id} of epoch {reply.epoch}, "
                    f"asked was step {step_id} of epoch {self.epoch}"
                )
        return unpack_result(replies[0])

    def close(self) -> None:
        """Ends the workers. Safe to call twice."""
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            if process.stdin and not process.stdin.closed:
                process.stdin.close()
        deadline = time.monotonic() + EXIT_TIMEOUT
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._dir, ignore_errors=True)

    def _wait_until_listening(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        for channel in self._channels:
            ready = grpc.channel_ready_future(channel)
            while True:
                self.check_alive()
                try:
                    ready.result(timeout=0.2)
                    break
                except grpc.FutureTimeoutError:
                    if time.monotonic() > deadline:
                        raise WorkerGroupError(
                            f"a worker did not listen within {START_TIMEOUT:.0f} s"
                        ) from None

    def _load(self, config: EngineConfig, on_progress: Callable[[int, int], None]) -> GroupMemory:
        calls = [
            stub.Load(
                pb.LoadRequest(
                    epoch=self.epoch,
                    model=str(config.model),
                    device=config.device,
                    dtype=config.dtype,
                    rank=rank,
                    tensor_parallel_size=self.size,
                    rendezvous=str(self._dir / "rendezvous"),
                    block_size=config.block_size,
                )
            )
            for rank, stub in enumerate(self._stubs)
        ]
        reports: list[pb.MemoryReport] = []
        items = _merge(calls)  # all ranks load at once; rank 0 tells how far
        while len(reports) < self.size:
            rank, item = self._await(items)
            if isinstance(item, Exception):
                raise self._fault(item, is_mendable=True)
            if item.HasField("memory"):
                reports.append(item.memory)
            elif rank == 0:
                on_progress(item.done_bytes, item.total_bytes)
        least = min(reports, key=lambda report: report.free_bytes)
        return GroupMemory(
            weight_bytes=sum(report.weight_bytes for report in reports),
            total_bytes=least.total_bytes,
            free_bytes=least.free_bytes,
            kv_block_bytes=least.kv_block_bytes,
            dtype=least.dtype,
            device=least.device,
        )

    def _gather(self, calls: Sequence[grpc.Future], deadline: float = math.inf) -> list:
        """The answers in rank order. The first failure kills the group: the other ranks may wait
        in a collective for the one that failed. So does a rank that hangs, and `deadline`."""
        done: queue.SimpleQueue[grpc.Future] = queue.SimpleQueue()
        for call in calls:
            call.add_done_callback(done.put)
        for _ in calls:
            try:
                error = self._await(done, deadline).exception()
                if error is not None:
                    raise self._fault(error)
            except WorkerGroupError:
                for process in self._processes:
                    process.kill()
                raise
        return [call.result() for call in calls]

    def _await(self, source: queue.SimpleQueue[Any], deadline: float = math.inf) -> Any:
        """The next of a queue. Raises `WorkerGroupError` when a worker ends or hangs meanwhile."""
        while True:
            try:
                return source.get(timeout=ALIVE_CHECK)
            except queue.Empty:
                self.check_alive()
            if time.monotonic() > deadline:
                raise WorkerGroupError("a step took far longer than its work should")

    def _fault(self, error: Exception, is_mendable: bool = False) -> Exception:
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

    def check_alive(self) -> None:
        """Raises `WorkerGroupError` when a worker has ended, or has not answered a ping for long.
        Pings are answered while a step runs, but not by a process that is stopped."""
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                raise WorkerGroupError(f"the worker of rank {rank} (pid {process.pid}) {how}")
        for rank, ping in enumerate(self._pings):
            if ping is None or ping.done():
                self._check_ping(rank, ping)
                request = pb.PingRequest()
                self._pings[rank] = self._stubs[rank].Ping.future(request, timeout=PING_TIMEOUT)

    def _check_ping(self, rank: int, ping: grpc.Future | None) -> None:
        error = None if ping is None else ping.exception()
        if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            pid = self._processes[rank].pid
            raise WorkerGroupError(
                f"the worker of rank {rank} (pid {pid}) did not answer for {PING_TIMEOUT:.0f} s"
            )


def _merge(calls: Sequence[Iterable[Any]]) -> queue.SimpleQueue[tuple[int, Any]]:
    """(rank, item) of several streams as they come; an error is a stream's last item."""
    items: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def read(rank: int, call: Iterable[Any]) -> None:
        try:
            for item in call:
                items.put((rank, item))
        except grpc.RpcError as error:
            items.put((rank, error))

    for rank, call in enumerate(calls):
        threading.Thread(target=read, args=(rank, call), name="load", daemon=True).start()
    return items


def _connect(socket: Path) -> grpc.Channel:
    # A local socket is there in milliseconds; the default back-off of a second would be most of
    # the start.
    backoff = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
    return grpc.insecure_channel(f"unix:{socket}", options=[*UNLIMITED, *backoff])


def _start_worker(socket: Path, num_ranks: int) -> subprocess.Popen[bytes]:
    """`-P`: our own folder names (`kernels`, `proto`) must not shadow a user's packages."""
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-P", "-m", "octavo.engine.worker.worker", "--socket", str(socket)]
    # Its own session: Ctrl-C in a terminal reaches the engine alone, which closes the group.
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, start_new_session=True)
