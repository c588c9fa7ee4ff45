"""Ownership of a remote worker: one engine claims it; it exits when that engine disappears.

A process serves one engine for one epoch of a group. Then it exits, which reliably frees its
memory, its device and its collectives, and `supervisor.py` starts the next one.
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

LEASE = 5.0  # seconds without its engine's stream after which a claimed worker exits
WATCH = 0.5  # seconds between two checks of the lease
SHUTDOWN_GRACE = 0.1  # seconds to send the last reply before the exit


@dataclass(frozen=True)
class WorkerSpec:
    """Settings of a remote worker, from the options of `octavo worker`."""

    rank: int
    local_rank: int  # index of its GPU on this machine
    model: Path
    rendezvous: Rendezvous = field(default_factory=Rendezvous)


@dataclass(frozen=True)
class EngineClaim:
    """The engine that owns a worker, and the epoch of its group."""

    engine_id: str
    epoch: int


class MembershipServicer(worker_pb2_grpc.MembershipServicer):
    """Serves `octavo.worker.v1.Membership`."""

    def __init__(self, spec: WorkerSpec, leave: Callable[[str], None]) -> None:
        """Compute the checkpoint's fingerprint and start to watch the lease.

        `leave` ends the process; its argument is the reason, for the log. Raises `ConfigError` if
        the checkpoint cannot be read.
        """
        self._spec, self._leave = spec, leave
        self._stamps = stamps(spec.model)
        self._fingerprint = fingerprint(spec.model)
        self._lock = threading.Lock()
        self._claim: EngineClaim | None = None
        self._num_open = 0  # open streams of the engine; two until a broken one is detected
        self._left_at = 0.0  # time.monotonic() at which the last stream broke
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinReply:
        spec = self._spec
        if problem := _problem(request, spec.rank):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, problem)
        if rejection := self._take(EngineClaim(request.engine_id, request.epoch)):
            context.abort(grpc.StatusCode.UNAVAILABLE, rejection)
        log.info("rank %d of %d joins an engine", spec.rank, request.tensor_parallel_size)
        return pb.JoinReply(
            fingerprint=self._fingerprint,
            model=str(spec.model),
            pid=os.getpid(),
            cores=cores_id(),
        )

    def Meet(
        self, replies: Iterator[pb.StoreReply], context: grpc.ServicerContext
    ) -> Iterator[pb.StoreRequest]:
        timer = threading.Timer(LEASE, context.cancel)
        timer.start()
        first = next(replies, None)
        timer.cancel()
        if first is None or not self.is_claimed_for(first.epoch):
            text = "the stream is not from the engine that claimed the worker"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        with self._lock:
            self._num_open += 1
        if not context.add_callback(self._close_stream):
            self._close_stream()  # the call has already ended
        context.send_initial_metadata(())  # confirms the claim to the engine
        yield from self._spec.rendezvous.serve(replies, context.is_active)

    def End(self, request: pb.EndRequest, context: grpc.ServicerContext) -> pb.EndReply:
        if not self.is_claimed_for(request.epoch):
            text = "the epoch is not that of the engine that claimed the worker"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        self._leave_soon("the engine ended it")
        return pb.EndReply()

    def is_claimed_for(self, epoch: int) -> bool:
        """Return whether the worker is claimed for that epoch of a group."""
        return self._claim is not None and self._claim.epoch == epoch

    def _take(self, claim: EngineClaim) -> str:
        """Accept a claim and return "", or return why it is rejected."""
        with self._lock:
            if self._claim is None and stamps(self._spec.model) != self._stamps:
                self._leave_soon("its checkpoint has changed")
                return "it is restarting because its checkpoint has changed"
            if self._claim is None:
                self._claim, self._left_at = claim, time.monotonic()
            if self._claim == claim:
                return ""
            if self._claim.engine_id != claim.engine_id:
                return "it serves another engine"
        self._leave_soon("its engine has restarted the group")
        return "it is restarting"

    def _close_stream(self) -> None:
        with self._lock:
            self._num_open -= 1
            self._left_at = time.monotonic()

    def _leave_soon(self, reason: str) -> None:
        threading.Timer(SHUTDOWN_GRACE, self._leave, (reason,)).start()

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH)
            with self._lock:
                is_leased = self._claim is None or self._num_open > 0
                has_expired = not is_leased and time.monotonic() - self._left_at > LEASE
            if has_expired:
                self._leave("its engine has disappeared")


def _problem(request: pb.JoinRequest, rank: int) -> str:
    if request.version != __version__:
        return (
            f"it runs Octavo {__version__}, the engine {request.version}; install the same version"
        )
    if request.rank != rank:
        return (
            f"it was started with --rank {rank}, but is at index {request.rank} of workers; "
            "change one of the two"
        )
    return ""


def use_interface(peer: str) -> None:
    """Make collectives use the interface that leads to `peer`, unless the environment sets one."""
    name = interface_towards(peer)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    elif "GLOO_SOCKET_IFNAME" not in os.environ and "NCCL_SOCKET_IFNAME" not in os.environ:
        text = (
            "no network interface found that leads to %s; collectives use their default. If they "
            "hang, set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        )
        log.warning(text, peer)
