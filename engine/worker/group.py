"""The worker group: starts one process a rank and fans each step out to them over gRPC."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from ...proto import worker_pb2 as pb
from ..config.engine_config import EngineConfig
from ..runner.batch import BatchResult, InputBatch
from ..utils.failpoints import failpoint
from ..utils.lifetime import call_in_flight, close_at_exit, disown_after_fork, leak, track_call
from .link import PING_TIMEOUT, WorkerGroupError, WorkerLink
from .loading import GroupMemory, start_loading
from .process import shared_memory, start_worker
from .remote.join import RemoteWorkers
from .socket_folder import make_socket_folder
from .watch import CLOSING, StepBound, Watch, work_of
from .wire import pack_steps, unpack_results
from .worker import RENDEZVOUS

log = logging.getLogger("octavo.group")

START_TIMEOUT = 120.0  # seconds for a worker's socket to answer: imports on a cold disk
RESEND_PAUSE = 0.05  # seconds before a rank that was out of reach is asked again
LOAD_SILENCE = 900.0  # seconds without a word of a rank that loads
NOT_LOADING = "the workers neither load nor fail: perhaps the ranks cannot reach each other"
EXIT_TIMEOUT = 5.0  # seconds for a worker to end when asked

_epochs = itertools.count(1 + secrets.randbits(62))  # no other engine's


@dataclass(eq=False)
class SentStep:
    """A step on its way."""

    step_id: int
    requests: tuple[pb.StepRequest, ...]  # by rank, as the calls
    calls: list[grpc.Future]
    work: float
    sent_at: float
    done_at: float = 0.0  # when the latest answer came, whoever waits for it


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
        self._engine_id = secrets.token_hex(8)
        self._is_first = True
        self.given_up = threading.Event()  # nobody waits for workers any more: see `give_up`
        self._in_change = threading.RLock()  # the workers are being started, restarted or ended
        self._is_disowned = self._is_closed = False  # see `disown`, `close`
        self._workers: list[WorkerLink] = []
        self._num_blocks = 0
        self._bound = StepBound()
        close_at_exit(self)
        disown_after_fork(self)
        self._start(on_progress or (lambda done, total: None))

    def _start(self, on_progress: Callable[[int, int], None]) -> None:
        with self._in_change, call_in_flight():
            self._launch(on_progress)

    def _launch(self, on_progress: Callable[[int, int], None]) -> None:
        self.epoch = next(_epochs)
        self._dir = make_socket_folder()
        self._workers = []
        self._sharing: list[int] = []  # see `RemoteWorkers.join`
        self._watch = Watch(self._workers, self.given_up)
        self._sent: deque[SentStep] = deque()
        self._latest = 0  # the step sent last in this epoch
        self.done_at = 0.0  # of the latest step that was received, on the monotonic clock
        try:
            if self._config.workers:
                self._join_workers()
            else:
                self._start_workers()
            self.memory = self._load(on_progress)
            self._watch.is_loaded, self._is_first = True, False
        except BaseException:
            self._end_workers()
            raise

    def restart(self) -> None:
        """Ends what is left of the workers and starts new ones, under a new epoch, with a KV cache
        of the same size and nothing in it. Raises `WorkerGroupError` if those fail too."""
        with self._in_change:
            for worker in self._workers:
                worker.life.kill()
            self._end_workers()
            self._start(lambda done, total: None)
            self.allocate(self._num_blocks)

    def give_up(self) -> None:
        """From now on workers that are gone are not waited for: the group is to close. Whoever
        waits gets `WorkerGroupError`; a step of workers that are there is finished. Any thread."""
        self.given_up.set()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids in rank order, each of the machine that the worker is on."""
        return tuple(worker.life.pid for worker in self._workers)

    @property
    def local_pids(self) -> dict[int, int]:
        """By rank, of the workers on this machine that the group has started."""
        return {} if self._config.workers else dict(enumerate(self.pids))

    def allocate(self, num_blocks: int) -> None:
        """Makes the KV cache on every rank."""
        self._num_blocks = num_blocks
        request = pb.AllocateRequest(epoch=self.epoch, num_blocks=num_blocks)
        calls = [track_call(worker.stub.Allocate.future(request)) for worker in self._workers]
        done: queue.SimpleQueue[grpc.Future] = queue.SimpleQueue()
        with self._killing():
            for call in calls:
                call.add_done_callback(done.put)
            for _ in calls:
                error = self._watch.next_of(done).exception()
                if error is not None:
                    raise self._watch.fault(error)

    def send(self, batch: InputBatch, step_id: int) -> None:
        """Has all ranks run a step, after those that were sent before. Raises `WorkerGroupError`
        once the group is closed."""
        if self._is_closed:
            raise WorkerGroupError(CLOSING)
        previous, self._latest = self._latest, step_id
        requests = pack_steps(batch, self.epoch, step_id, previous, self.size)
        failpoint("group.sends")
        sent = SentStep(step_id, requests, [], work_of(batch), time.monotonic())
        sent.calls = [self._ask(sent, rank) for rank in range(self.size)]
        self._sent.append(sent)
        failpoint("group.sent")

    def receive(self) -> BatchResult:
        """The result of the oldest step that was sent. Rank 0 sampled; a rank that lacks an
        embedding speaks for all. The first failure kills the group: the other ranks may wait in a
        collective for the one that failed. So does a rank that hangs, and a step that takes too
        long."""
        sent = self._sent.popleft()
        began = max(sent.sent_at, self.done_at)
        with self._killing():
            replies = self._collect(sent, began + self._bound.seconds(sent.work))
            for reply in replies:
                if (reply.epoch, reply.step_id) != (self.epoch, sent.step_id):
                    raise WorkerGroupError(
                        f"a worker answered step {reply.step_id} of epoch {reply.epoch}, "
                        f"asked was step {sent.step_id} of epoch {self.epoch}"
                    )
        # What notes the moment may run after the answer was seen: on gRPC's thread.
        self.done_at = sent.done_at or time.monotonic()
        self._bound.learn(sent.work, self.done_at - began)
        return unpack_results(replies)

    @contextlib.contextmanager
    def _killing(self) -> Iterator[None]:
        """A fault ends all workers at once."""
        try:
            yield
        except WorkerGroupError:
            for worker in self._workers:
                worker.life.kill()
            raise

    def close(self) -> None:
        """End the workers. Safe to call twice, on any thread, also while another one starts or
        restarts them; without effect in a forked process."""
        if self._is_disowned:
            return
        self.give_up()
        with self._in_change:
            self._is_closed = True
            self._end_workers()

    def disown(self, cause: str) -> None:
        """Release this process's copies of the pipes whose end the workers wait for. Called in a
        forked process."""
        self._is_disowned = True
        for worker in self._workers:
            leak(worker.channel)
            worker.life.disown()

    def _end_workers(self) -> None:
        with self._in_change:
            for worker in self._workers:
                worker.life.ask_to_end()
            deadline = time.monotonic() + EXIT_TIMEOUT
            for worker in self._workers:
                worker.life.wait_ended(deadline)
                worker.channel.close()
            shutil.rmtree(self._dir, ignore_errors=True)

    def _join_workers(self) -> None:
        remote = RemoteWorkers(self._config, self._engine_id, self.epoch)
        self._workers.extend(remote.links)
        self._sharing = remote.join(self._is_first, self.given_up)

    def _start_workers(self) -> None:
        with shared_memory() as shared:
            for rank in range(self.size):
                socket = self._dir / f"rank{rank}.sock"
                self._workers.append(start_worker(rank, socket, self.size, self.epoch, shared))
        deadline = time.monotonic() + START_TIMEOUT
        for worker in self._workers:
            ready = grpc.channel_ready_future(worker.channel)
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

    def _load(self, on_progress: Callable[[int, int], None]) -> GroupMemory:
        """All ranks load at once; rank 0 tells how far."""
        rendezvous = None if self._config.workers else self._dir / RENDEZVOUS
        items = start_loading(self._workers, self._config, rendezvous, self._sharing)
        reports: list[pb.MemoryReport] = []
        while len(reports) < self.size:
            rank, item = self._watch.next_of(items, time.monotonic() + LOAD_SILENCE, NOT_LOADING)
            if isinstance(item, Exception):
                raise self._watch.fault(item, is_mendable=True)
            if item.HasField("memory"):
                reports.append(item.memory)
            elif rank == 0:
                on_progress(item.done_bytes, item.total_bytes)
        return GroupMemory.of(reports)

    def _collect(self, sent: SentStep, deadline: float) -> list[pb.StepReply]:
        """The replies to a step in rank order. A rank that is out of reach, or that missed a step,
        is asked again for a while: it runs each step once."""
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        for rank, call in enumerate(sent.calls):
            call.add_done_callback(lambda _, rank=rank: done.put(rank))
        replies: dict[int, pb.StepReply] = {}
        lost_at: dict[int, float] = {}  # when each rank was first out of reach
        while len(replies) < self.size:
            rank = self._watch.next_of(done, deadline)
            error = sent.calls[rank].exception()
            if error is None:
                replies[rank] = sent.calls[rank].result()
                self._workers[rank].heard()
                continue
            now = time.monotonic()
            if rank not in lost_at and _is_lost(error):  # told once, however often it is tried
                text = "step %d is sent to rank %d again: %s"
                log.warning(text, sent.step_id, rank, _text(error))
            if not _is_lost(error) or now - lost_at.setdefault(rank, now) > PING_TIMEOUT:
                raise self._watch.fault(error)
            if self.given_up.wait(RESEND_PAUSE):
                raise self._watch.fault(error)
            self._workers[rank].check_ended()
            deadline = time.monotonic() + self._bound.seconds(sent.work)
            sent.calls[rank] = self._ask(sent, rank)
            sent.calls[rank].add_done_callback(lambda _, rank=rank: done.put(rank))
        return [replies[rank] for rank in range(self.size)]

    def _ask(self, sent: SentStep, rank: int) -> grpc.Future:
        def done(call: grpc.Future) -> None:
            sent.done_at = time.monotonic()

        call = track_call(self._workers[rank].stub.Step.future(sent.requests[rank]))
        call.add_done_callback(done)
        return call

    def check_alive(self) -> None:
        """Raises `WorkerGroupError` when a worker has ended, or has not answered for long."""
        self._watch.check_alive()


def _is_lost(error: Exception) -> bool:
    """The connection broke, or the rank missed the step before."""
    return isinstance(error, grpc.RpcError) and error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
    )


def _text(error: Exception) -> str:
    return str(error.details() if isinstance(error, grpc.RpcError) else error)
