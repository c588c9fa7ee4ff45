"""Engine side of remote workers: claim them, keep the claim alive, release them."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from dataclasses import dataclass

import grpc

from .... import __version__
from ....proto import worker_pb2 as pb
from ....proto import worker_pb2_grpc
from ...config.engine_config import EngineConfig
from ...errors import ConfigError
from ...utils.lifetime import track_call
from ...utils.tls import group_tls
from ..link import UNLIMITED, WorkerGroupError, WorkerLink
from .address import Address
from .fingerprint import fingerprint
from .rendezvous import SharedStore

log = logging.getLogger("octavo.group")

JOIN_TIMEOUT = 600.0  # seconds until a worker must be reachable; it may still fetch its checkpoint
REJOIN_TIMEOUT = 120.0  # seconds until it must be reachable again after a restart
JOIN_PAUSE = 0.2  # seconds between two attempts
CALL_TIMEOUT = 30.0  # seconds per attempt
FIRST_LOG = 1.0  # seconds of waiting before the first log line
LOG_INTERVAL = 10.0  # seconds between two log lines about a worker that is waited for
REOPEN_PAUSE = 0.1  # seconds before a broken stream is opened again
UNTRUSTED = ("handshake failed", "verification check failed")  # in gRPC's error texts
# A worker that rejects the engine's certificate closes the socket; gRPC reports nothing more.
SOCKET_CLOSED_HINT = (
    "; check that its ca.crt signed this engine's certificate and that it was started with --tls"
)
# Keepalive pings detect a broken network link; see worker.py.
OPTIONS = [
    *UNLIMITED,
    ("grpc.enable_http_proxy", 0),  # a proxy would resolve loopback addresses to its own machine
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def check_workers(config: EngineConfig) -> tuple[Address, ...]:
    """Return the workers' addresses by rank.

    Raises `ConfigError` if an address is invalid or repeated, some addresses are loopback and
    others are not, or TLS is missing.
    """
    found = tuple(Address.parse(text, "workers") for text in config.workers)
    if len(set(found)) < len(found):
        raise ConfigError(f"workers={','.join(config.workers)}: an address is repeated")
    loopback = [each for each in found if each.is_loopback]
    if loopback and len(loopback) < len(found):
        raise ConfigError(
            f"workers: other machines cannot reach {loopback[0]}, a loopback address; pass this "
            "machine's address in their network"
        )
    if found and not loopback and config.worker_tls is None:
        raise ConfigError(
            f"workers: {found[0]} is on another machine and requires mutual TLS: set worker_tls "
            "(--worker-tls) to a folder with tls.crt, tls.key and ca.crt"
        )
    return found


@dataclass(frozen=True)
class _Assignment:
    """A worker's address and its rank in one epoch of an engine's group."""

    address: Address
    rank: int
    size: int
    engine_id: str
    epoch: int


class Hold:
    """An engine's claim on a remote worker; its `Life`."""

    def __init__(self, assignment: _Assignment, channel: grpc.Channel, store: SharedStore) -> None:
        self.assignment, self.pid = assignment, 0
        self._stub = worker_pb2_grpc.MembershipStub(channel)
        self._store = store
        self._given_up = threading.Event()
        self._end: grpc.Future | None = None
        self._has_ended = False  # the process is known to have exited

    def __str__(self) -> str:
        return str(self.assignment.address)

    def join(self, given_up: threading.Event) -> pb.JoinReply:
        """Try once to claim the worker.

        Raises `grpc.RpcError` if that fails, and `WorkerGroupError` once `given_up` is set.
        """
        assignment = self.assignment
        request = pb.JoinRequest(
            version=__version__,
            engine_id=assignment.engine_id,
            epoch=assignment.epoch,
            rank=assignment.rank,
            tensor_parallel_size=assignment.size,
        )
        call = track_call(self._stub.Join.future(request, timeout=CALL_TIMEOUT))
        while not _is_done(call, JOIN_PAUSE):
            if given_up.is_set():
                call.cancel()
                raise WorkerGroupError(f"{self} is not reachable")
        reply = call.result()
        self.pid = reply.pid
        threading.Thread(target=self._serve_stream, name="meet", daemon=True).start()
        return reply

    def _serve_stream(self) -> None:
        """Keep the `Meet` stream open and answer the worker's requests to the store.

        The open stream shows the worker that its engine is alive.
        """
        while not self._given_up.is_set():
            replies: queue.SimpleQueue[pb.StoreReply | None] = queue.SimpleQueue()
            replies.put(pb.StoreReply(epoch=self.assignment.epoch))
            call = track_call(self._stub.Meet(iter(replies.get, None)))
            try:
                for request in call:
                    replies.put(self._store.answer(request))
            except grpc.RpcError as error:
                # Either error proves that the process exited: FAILED_PRECONDITION comes from its
                # successor, and an unreachable host cannot refuse a connection.
                is_new = error.code() is grpc.StatusCode.FAILED_PRECONDITION
                if is_new or "connection refused" in (error.details() or "").lower():
                    self._has_ended = True
                    return
            finally:
                replies.put(None)
            self._given_up.wait(REOPEN_PAUSE)

    def check_ended(self) -> None:
        """Raise `WorkerGroupError` if the process is known to have exited.

        `WorkerLink.check_answers` detects a stopped or unreachable one.
        """
        if self._has_ended:
            raise WorkerGroupError("has ended")

    def kill(self) -> None:
        """Ask the worker to exit: a process on another machine cannot be killed."""
        self.ask_to_end()

    def ask_to_end(self) -> None:
        """Send `End`, without waiting for the reply."""
        self._given_up.set()
        if self._end is None and self.pid:
            self._end = self._stub.End.future(
                pb.EndRequest(epoch=self.assignment.epoch), timeout=CALL_TIMEOUT
            )

    def disown(self) -> None:
        """Do nothing: a forked process does not keep the `Meet` stream open."""

    def wait_ended(self, deadline: float) -> None:
        """Wait for the reply to `End` until `deadline` (time.monotonic())."""
        if self._end is None:
            return
        with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError):
            self._end.result(timeout=max(0.0, deadline - time.monotonic()))


class RemoteWorkers:
    """The remote workers in the configuration, by rank; `join` claims them."""

    def __init__(self, config: EngineConfig, engine_id: str, epoch: int) -> None:
        """Open channels to the workers. Raises `ConfigError` if the configuration is invalid.

        `engine_id` is the same in all epochs of a group.
        """
        self._model = config.model
        self._holds: list[Hold] = []
        self.links: list[WorkerLink] = []
        store, addresses = SharedStore(), check_workers(config)
        credentials = _credentials(config)
        for rank, address in enumerate(addresses):
            channel = _open(address, credentials)
            assignment = _Assignment(address, rank, len(addresses), engine_id, epoch)
            self._holds.append(Hold(assignment, channel, store))
            self.links.append(WorkerLink(rank, epoch, channel, self._holds[-1]))

    def join(self, is_first: bool, given_up: threading.Event) -> list[int]:
        """Claim all workers; wait for unreachable ones until a timeout or `given_up`.

        Returns by rank the number of workers that share the worker's cores. Raises `ConfigError`
        for a worker with another version, rank, checkpoint or TLS setup, and `WorkerGroupError` for
        one that stays unreachable.
        """
        own_fingerprint = fingerprint(self._model)
        deadline = time.monotonic() + (JOIN_TIMEOUT if is_first else REJOIN_TIMEOUT)
        cores: list[str] = []
        for link, hold in zip(self.links, self._holds, strict=True):
            reply = _join(str(link), hold, deadline, given_up)
            if reply.fingerprint != own_fingerprint:
                raise ConfigError(
                    f"{link} has other weights than {self._model}: its checkpoint {reply.model} "
                    f"has the fingerprint {reply.fingerprint[:12]}, not {own_fingerprint[:12]}; "
                    "start it with the same checkpoint"
                )
            cores.append(reply.cores)
        return [cores.count(each) for each in cores]


def _join(name: str, hold: Hold, deadline: float, given_up: threading.Event) -> pb.JoinReply:
    logged_at = time.monotonic() - LOG_INTERVAL + FIRST_LOG
    while True:
        try:
            return hold.join(given_up)
        except grpc.RpcError as error:
            reason = error.details() or error.code().name
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise ConfigError(f"{name}: {reason}") from None
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                text = "its certificate does not contain the host name in its address"
                raise ConfigError(f"{name}: TLS: {text}: {reason}") from None
            if any(words in reason.lower() for words in UNTRUSTED):
                text = "certificate verification failed"
                raise ConfigError(f"{name}: TLS: {text}: {reason}") from None
        now = time.monotonic()
        if now > deadline or given_up.wait(JOIN_PAUSE):
            hint = SOCKET_CLOSED_HINT if "socket closed" in reason.lower() else ""
            raise WorkerGroupError(f"{name} is not reachable: {reason}{hint}")
        if now - logged_at > LOG_INTERVAL:
            logged_at = now
            log.info("waiting for %s: %s", name, reason)


def _is_done(call: grpc.Future, seconds: float) -> bool:
    """Wait up to `seconds` for a call; return whether it is done."""
    with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError):
        call.result(timeout=seconds)
    return bool(call.done())


def _credentials(config: EngineConfig) -> grpc.ChannelCredentials | None:
    if config.worker_tls is None:
        return None
    cert, key, ca = group_tls(config.worker_tls).read()
    return grpc.ssl_channel_credentials(ca, key, cert)


def _open(address: Address, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(str(address), options=OPTIONS)
    return grpc.secure_channel(str(address), credentials, options=OPTIONS)
