"""The worker group: start one process per rank and send each step to all of them over gRPC."""

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

START_TIMEOUT = 120.0  # seconds until a worker's socket must accept; imports may read a cold disk
RESEND_PAUSE = 0.05  # seconds before a step is sent again to an unreachable rank
LOAD_SILENCE = 900.0  # seconds that a loading rank may go without a message
NOT_LOADING = (
    "the workers make no progress in loading; check that the ranks can reach each other over the "
    "network"
)
EXIT_TIMEOUT = 5.0  # seconds for a worker to exit when asked

_epochs = itertools.count(1 + secrets.randbits(62))  # random start, to differ between engines


@dataclass(eq=False)
class SentStep:
    """A step in flight."""

    step_id: int
    requests: tuple[pb.StepRequest, ...]  # by rank
    calls: list[grpc.Future]  # by rank
    work: float
    sent_at: float
    done_at: float = 0.0  # time of the latest reply, even if it is not received yet


class WorkerGroup:
    """`tensor_parallel_size` workers that run steps together. Not thread-safe."""

    def __init__(
        self, config: EngineConfig, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Start the workers and load the weights.

        Raises `ConfigError` if the configuration is invalid, `WorkerGroupError` if a worker fails.
        """
        self.size = config.tensor_parallel_size
        self._config = config
        self._engine_id = secrets.token_hex(8)
        self._is_first = True
        self.given_up = threading.Event()  # see `give_up`
        self._lifecycle_lock = threading.RLock()  # held while workers are started or ended
        self._is_disowned = self._is_closed = False  # see `disown`, `close`
        self._workers: list[WorkerLink] = []
        self._num_blocks = 0
        self._bound = StepBound()
        close_at_exit(self)
        disown_after_fork(self)
        self._start(on_progress or (lambda done, total: None))

    def _start(self, on_progress: Callable[[int, int], None]) -> None:
        with self._lifecycle_lock, call_in_flight():
            self._launch(on_progress)

    def _launch(self, on_progress: Callable[[int, int], None]) -> None:
        self.epoch = next(_epochs)
        self._dir = make_socket_folder()
        self._workers = []
        self._sharing: list[int] = []  # see `RemoteWorkers.join`
        self._watch = Watch(self._workers, self.given_up)
        self._sent: deque[SentStep] = deque()
        self._latest = 0  # id of the last step sent in this epoch
        self.done_at = 0.0  # end of the last received step, time.monotonic()
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
        """Kill the workers and start new ones in a new epoch, with an empty KV cache of equal size.

        Raises `WorkerGroupError` if the new workers fail too.
        """
        with self._lifecycle_lock:
            for worker in self._workers:
                worker.life.kill()
            self._end_workers()
            self._start(lambda done, total: None)
            self.allocate(self._num_blocks)

    def give_up(self) -> None:
        """Stop waiting for unreachable workers, because the group is about to close.

        Waiting calls raise `WorkerGroupError`; a step of reachable workers still completes.
        Callable by any thread.
        """
        self.given_up.set()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids by rank, each on the machine of its worker."""
        return tuple(worker.life.pid for worker in self._workers)

    @property
    def local_pids(self) -> dict[int, int]:
        """Process ids by rank of workers started by this group; empty for remote workers."""
        return {} if self._config.workers else dict(enumerate(self.pids))

    def allocate(self, num_blocks: int) -> None:
        """Allocate the KV cache on all ranks. Raises `WorkerGroupError` if one fails."""
        self._num_blocks = num_blocks
        request = pb.AllocateRequest(epoch=self.epoch, num_blocks=num_blocks)
        calls = [track_call(worker.stub.Allocate.future(request)) for worker in self._workers]
        done: queue.SimpleQueue[grpc.Future] = queue.SimpleQueue()
        with self._kill_on_error():
            for call in calls:
                call.add_done_callback(done.put)
            for _ in calls:
                error = self._watch.next_of(done).exception()
                if error is not None:
                    raise self._watch.fault(error)

    def send(self, batch: InputBatch, step_id: int) -> None:
        """Send a step to all ranks; they run it after the steps sent before.

        Raises `WorkerGroupError` if the group is closed.
        """
        if self._is_closed:
            raise WorkerGroupError(CLOSING)
        previous, self._latest = self._latest, step_id
        requests = pack_steps(batch, self.epoch, step_id, previous, self.size)
        failpoint("group.sends")
        sent = SentStep(step_id, requests, [], work_of(batch), time.monotonic())
        sent.calls = [self._call_step(sent, rank) for rank in range(self.size)]
        self._sent.append(sent)
        failpoint("group.sent")

    def receive(self) -> BatchResult:
        """Return the result of the oldest step in flight; rank 0 samples.

        An embedding that one rank lacks counts as missing on all. Raises `WorkerGroupError` and
        kills the group if a rank fails or hangs or the step takes too long, because the other
        ranks may be blocked in a collective with that rank.
        """
        sent = self._sent.popleft()
        start_time = max(sent.sent_at, self.done_at)
        with self._kill_on_error():
            replies = self._collect(sent, start_time + self._bound.seconds(sent.work))
            for reply in replies:
                if (reply.epoch, reply.step_id) != (self.epoch, sent.step_id):
                    raise WorkerGroupError(
                        f"a worker replied to step {reply.step_id} of epoch {reply.epoch}; "
                        f"expected step {sent.step_id} of epoch {self.epoch}"
                    )
        # A callback on gRPC's thread sets `sent.done_at`, possibly after this line.
        self.done_at = sent.done_at or time.monotonic()
        self._bound.learn(sent.work, self.done_at - start_time)
        return unpack_results(replies)

    @contextlib.contextmanager
    def _kill_on_error(self) -> Iterator[None]:
        """Kill all workers if a `WorkerGroupError` is raised."""
        try:
            yield
        except WorkerGroupError:
            for worker in self._workers:
                worker.life.kill()
            raise

    def close(self) -> None:
        """End the workers. Has no effect in a forked process.

        Safe to call twice and from any thread, even while another one starts or restarts workers.
        """
        if self._is_disowned:
            return
        self.give_up()
        with self._lifecycle_lock:
            self._is_closed = True
            self._end_workers()

    def disown(self, cause: str) -> None:
        """Close this process's copies of the pipes. Called in a forked process.

        Workers exit when all copies of their pipe are closed, so a fork must not keep them open.
        """
        self._is_disowned = True
        for worker in self._workers:
            leak(worker.channel)
            worker.life.disown()

    def _end_workers(self) -> None:
        with self._lifecycle_lock:
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
                            f"a worker did not start within {START_TIMEOUT:.0f} s"
                        ) from None

    def _load(self, on_progress: Callable[[int, int], None]) -> GroupMemory:
        """Load the weights on all ranks in parallel; rank 0 reports progress."""
        rendezvous = None if self._config.workers else self._dir / RENDEZVOUS
        items = start_loading(self._workers, self._config, rendezvous, self._sharing)
        reports: list[pb.MemoryReport] = []
        while len(reports) < self.size:
            rank, item = self._watch.next_of(items, time.monotonic() + LOAD_SILENCE, NOT_LOADING)
            if isinstance(item, Exception):
                raise self._watch.fault(item, may_be_config_error=True)
            if item.HasField("memory"):
                reports.append(item.memory)
            elif rank == 0:
                on_progress(item.done_bytes, item.total_bytes)
        return GroupMemory.of(reports)

    def _collect(self, sent: SentStep, deadline: float) -> list[pb.StepReply]:
        """Return the replies to a step in rank order.

        If a rank is unreachable or missed a previous step, the step is sent again for up to
        `PING_TIMEOUT`; a rank runs each step only once.
        """
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        for rank, call in enumerate(sent.calls):
            call.add_done_callback(lambda _, rank=rank: done.put(rank))
        replies: dict[int, pb.StepReply] = {}
        lost_at: dict[int, float] = {}  # when each rank was first unreachable
        while len(replies) < self.size:
            rank = self._watch.next_of(done, deadline)
            error = sent.calls[rank].exception()
            if error is None:
                replies[rank] = sent.calls[rank].result()
                self._workers[rank].heard()
                continue
            now = time.monotonic()
            if rank not in lost_at and _is_lost(error):  # log only the first of many attempts
                text = "sending step %d to rank %d again: %s"
                log.warning(text, sent.step_id, rank, _text(error))
            if not _is_lost(error) or now - lost_at.setdefault(rank, now) > PING_TIMEOUT:
                raise self._watch.fault(error)
            if self.given_up.wait(RESEND_PAUSE):
                raise self._watch.fault(error)
            self._workers[rank].check_ended()
            deadline = time.monotonic() + self._bound.seconds(sent.work)
            sent.calls[rank] = self._call_step(sent, rank)
            sent.calls[rank].add_done_callback(lambda _, rank=rank: done.put(rank))
        return [replies[rank] for rank in range(self.size)]

    def _call_step(self, sent: SentStep, rank: int) -> grpc.Future:
        def done(call: grpc.Future) -> None:
            sent.done_at = time.monotonic()

        try:
            call = track_call(self._workers[rank].stub.Step.future(sent.requests[rank]))
        except ValueError as error:  # The channel was closed by `close` in another thread.
            raise WorkerGroupError(CLOSING) from error
        call.add_done_callback(done)
        return call

    def check_alive(self) -> None:
        """Raise `WorkerGroupError` if a worker has exited or does not answer pings."""
        self._watch.check_alive()


def _is_lost(error: Exception) -> bool:
    """Return whether the connection broke or the rank missed the previous step."""
    return isinstance(error, grpc.RpcError) and error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
    )


def _text(error: Exception) -> str:
    return str(error.details() if isinstance(error, grpc.RpcError) else error)
