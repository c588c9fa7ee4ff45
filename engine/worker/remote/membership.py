"""A worker that was started apart: whose it is, and that it goes when its engine has gone.

It serves one engine at a time, for one life of a group. After that the process ends, so that its
memory, its device and its collectives are free for certain, and `supervisor.py` starts the next.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from .... import __version__
from ....proto import worker_pb2 as pb
from ....proto import worker_pb2_grpc
from ...utils.cores import cores_id
from .address import interface_towards
from .fingerprint import fingerprint, stamps
from .rendezvous import Rendezvous

log = logging.getLogger("octavo.worker")

LEASE = 5.0  # seconds without its engine's stream after which a worker that is taken ends
WATCH = 0.5  # seconds between two looks
SHUTDOWN_GRACE = 0.1  # seconds for the last answer to go out


@dataclass(frozen=True)
class WorkerSpec:
    """What whoever started the worker has said of it."""

    rank: int
    local_rank: int  # the number of its GPU on this machine
    model: Path
    meeting: Rendezvous = field(default_factory=Rendezvous)


@dataclass(frozen=True)
class EngineClaim:
    engine_id: str
    epoch: int


class MembershipServicer(worker_pb2_grpc.MembershipServicer):
    def __init__(self, place: WorkerSpec, leave: Callable[[str], None]) -> None:
        """`leave` ends the process; it is told why. Reads samples of the checkpoint. Raises
        `ConfigError`."""
        self._place, self._leave = place, leave
        self._stamps = stamps(place.model)
        self._mark = fingerprint(place.model)
        self._lock = threading.Lock()
        self._claim: EngineClaim | None = None
        self._num_open = 0  # of the engine's streams: two while a broken one is not noticed yet
        self._left_at = 0.0  # when the last of them broke, on the monotonic clock
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinReply:
        place = self._place
        if problem := _problem(request, place.rank):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, problem)
        if refused := self._take(EngineClaim(request.engine_id, request.epoch)):
            context.abort(grpc.StatusCode.UNAVAILABLE, refused)
        log.info("rank %d of %d joins an engine", place.rank, request.tensor_parallel_size)
        return pb.JoinReply(
            fingerprint=self._mark, model=str(place.model), pid=os.getpid(), cores=cores_id()
        )

    def Meet(
        self, replies: Iterator[pb.StoreReply], context: grpc.ServicerContext
    ) -> Iterator[pb.StoreRequest]:
        patience = threading.Timer(LEASE, context.cancel)
        patience.start()
        first = next(replies, None)
        patience.cancel()
        if first is None or not self.is_taken_in(first.epoch):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this is not its engine's stream")
        with self._lock:
            self._num_open += 1
        if not context.add_callback(self._close_stream):
            self._close_stream()  # it is over already
        context.send_initial_metadata(())  # the engine knows now that it is held
        yield from self._place.meeting.serve(replies, context.is_active)

    def End(self, request: pb.EndRequest, context: grpc.ServicerContext) -> pb.EndReply:
        if not self.is_taken_in(request.epoch):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this is not its engine's epoch")
        self._leave_soon("the engine has ended it")
        return pb.EndReply()

    def is_taken_in(self, epoch: int) -> bool:
        return self._claim is not None and self._claim.epoch == epoch

    def _take(self, claim: EngineClaim) -> str:
        """Why it is refused, or nothing."""
        with self._lock:
            if self._claim is None and stamps(self._place.model) != self._stamps:
                self._leave_soon("its checkpoint has changed")
                return "it starts anew: its checkpoint has changed"
            if self._claim is None:
                self._claim, self._left_at = claim, time.monotonic()
            if self._claim == claim:
                return ""
            if self._claim.engine_id != claim.engine_id:
                return "it serves another engine"
        self._leave_soon("its engine has begun anew")
        return "it starts anew"

    def _close_stream(self) -> None:
        with self._lock:
            self._num_open -= 1
            self._left_at = time.monotonic()

    def _leave_soon(self, why: str) -> None:
        threading.Timer(SHUTDOWN_GRACE, self._leave, (why,)).start()

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH)
            with self._lock:
                held = self._claim is None or self._num_open > 0
                is_over = not held and time.monotonic() - self._left_at > LEASE
            if is_over:
                self._leave("its engine is gone")


def _problem(request: pb.JoinRequest, rank: int) -> str:
    if request.version != __version__:
        return f"it has Octavo {__version__}, the engine {request.version}: install the same"
    if request.rank != rank:
        return f"it was started with --rank {rank} and is named in place {request.rank}"
    return ""


def use_interface(peer: str) -> None:
    """Has collectives go by the interface that leads to `peer`, where nobody has named one."""
    name = interface_towards(peer)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    elif "GLOO_SOCKET_IFNAME" not in os.environ and "NCCL_SOCKET_IFNAME" not in os.environ:
        text = "no interface is known to lead to %s: the ranks find their own way to each other"
        log.warning(text, peer)
