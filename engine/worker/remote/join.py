"""Workers that were started apart, as their engine sees them: joined, held, ended."""

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

JOIN_TIMEOUT = 600.0  # seconds for a worker to be there: it may still be fetching its checkpoint
REJOIN_TIMEOUT = 120.0  # seconds for it to be back
JOIN_PAUSE = 0.2  # seconds between two tries
CALL_TIMEOUT = 30.0  # seconds for one: the checkpoint's fingerprint is made meanwhile
TELL_FIRST = 1.0  # seconds of waiting before it is told of,
TELL_EVERY = 10.0  # seconds between two lines on a worker that is waited for
REOPEN_PAUSE = 0.1  # seconds before a stream that broke is opened again
UNTRUSTED = ("handshake failed", "verification check failed")  # in gRPC's texts
# What a worker says by hanging up; gRPC's text is no more than that the socket closed.
HUNG_UP = (
    "; it may be that its ca.crt did not sign this engine's certificate, or that it has no --tls"
)
# See worker.py: a cut cable says nothing.
OPTIONS = [
    *UNLIMITED,
    ("grpc.enable_http_proxy", 0),  # it would dial a loopback of its own
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def check_workers(config: EngineConfig) -> tuple[Address, ...]:
    """Where the workers are, by rank. Raises `ConfigError` for what could not be a group."""
    found = tuple(Address.parse(text, "workers") for text in config.workers)
    if len(set(found)) < len(found):
        raise ConfigError(f"workers={','.join(config.workers)}: one of them is named twice")
    near = [each for each in found if each.is_loopback]
    if near and len(near) < len(found):
        raise ConfigError(
            f"workers: the others cannot reach {near[0]}, a loopback address; name this machine's "
            "address in their network"
        )
    if found and not near and config.worker_tls is None:
        raise ConfigError(
            f"workers: {found[0]} is another machine's, so it takes mutual TLS: worker_tls "
            "(--worker-tls), a folder of tls.crt, tls.key and ca.crt"
        )
    return found


@dataclass(frozen=True)
class _Seat:
    address: Address
    rank: int
    size: int
    engine_id: str
    epoch: int


class Hold:
    """An engine's hold on a worker. See `Life`."""

    def __init__(self, seat: _Seat, channel: grpc.Channel, store: SharedStore) -> None:
        self.seat, self.pid = seat, 0
        self._stub = worker_pb2_grpc.MembershipStub(channel)
        self._store = store
        self._given_up = threading.Event()
        self._end: grpc.Future | None = None
        self._has_ended = False  # for certain

    def __str__(self) -> str:
        return str(self.seat.address)

    def join(self, given_up: threading.Event) -> pb.JoinReply:
        """One try. Raises RpcError, and `WorkerGroupError` once it is given up."""
        seat = self.seat
        request = pb.JoinRequest(
            version=__version__,
            engine_id=seat.engine_id,
            epoch=seat.epoch,
            rank=seat.rank,
            tensor_parallel_size=seat.size,
        )
        call = track_call(self._stub.Join.future(request, timeout=CALL_TIMEOUT))
        while not _is_done(call, JOIN_PAUSE):
            if given_up.is_set():
                call.cancel()
                raise WorkerGroupError(f"{self} is not there")
        reply = call.result()
        self.pid = reply.pid
        threading.Thread(target=self._attend, name="meet", daemon=True).start()
        return reply

    def _attend(self) -> None:
        """Keeps the stream open by which the worker knows that its engine lives, and answers what
        it asks there."""
        while not self._given_up.is_set():
            replies: queue.SimpleQueue[pb.StoreReply | None] = queue.SimpleQueue()
            replies.put(pb.StoreReply(epoch=self.seat.epoch))
            call = track_call(self._stub.Meet(iter(replies.get, None)))
            try:
                for request in call:
                    replies.put(self._store.answer(request))
            except grpc.RpcError as error:
                # Another process, or none: a host that is out of reach refuses nothing.
                is_new = error.code() is grpc.StatusCode.FAILED_PRECONDITION
                if is_new or "connection refused" in (error.details() or "").lower():
                    self._has_ended = True
                    return
            finally:
                replies.put(None)
            self._given_up.wait(REOPEN_PAUSE)

    def check_ended(self) -> None:
        """Raises `WorkerGroupError` when that is certain. One that is stopped or out of reach does
        not answer: see `WorkerLink.check_answers`."""
        if self._has_ended:
            raise WorkerGroupError("has ended")

    def kill(self) -> None:
        self.ask_to_end()

    def ask_to_end(self) -> None:
        self._given_up.set()
        if self._end is None and self.pid:
            self._end = self._stub.End.future(
                pb.EndRequest(epoch=self.seat.epoch), timeout=CALL_TIMEOUT
            )

    def disown(self) -> None:
        """Nothing to do: a fork does not hold the stream by which the worker knows its engine."""

    def wait_ended(self, deadline: float) -> None:
        if self._end is None:
            return
        with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError):
            self._end.result(timeout=max(0.0, deadline - time.monotonic()))


class RemoteWorkers:
    """Those that the configuration names, by rank; none of them is joined at first."""

    def __init__(self, config: EngineConfig, engine_id: str, epoch: int) -> None:
        """`engine_id` is the group's own in all its lives. Raises `ConfigError`."""
        self._model = config.model
        self._holds: list[Hold] = []
        self.links: list[WorkerLink] = []
        store, addresses = SharedStore(), check_workers(config)
        credentials = _credentials(config)
        for rank, address in enumerate(addresses):
            channel = _open(address, credentials)
            seat = _Seat(address, rank, len(addresses), engine_id, epoch)
            self._holds.append(Hold(seat, channel, store))
            self.links.append(WorkerLink(rank, epoch, channel, self._holds[-1]))

    def join(self, is_first: bool, given_up: threading.Event) -> list[int]:
        """Takes them for this engine; waits for those that are not there, until it is given up.
        Gives how many of them share each one's cores, by rank. Raises `ConfigError` for what the
        user can mend and `WorkerGroupError` for one that does not come."""
        mark = fingerprint(self._model)
        deadline = time.monotonic() + (JOIN_TIMEOUT if is_first else REJOIN_TIMEOUT)
        cores: list[str] = []
        for link, hold in zip(self.links, self._holds, strict=True):
            reply = _join(str(link), hold, deadline, given_up)
            if reply.fingerprint != mark:
                raise ConfigError(
                    f"{link} has other weights than {self._model}: its checkpoint {reply.model} "
                    f"has the fingerprint {reply.fingerprint[:12]} and not {mark[:12]}; start it "
                    "with the same one"
                )
            cores.append(reply.cores)
        return [cores.count(each) for each in cores]


def _join(name: str, hold: Hold, deadline: float, given_up: threading.Event) -> pb.JoinReply:
    told = time.monotonic() - TELL_EVERY + TELL_FIRST
    while True:
        try:
            return hold.join(given_up)
        except grpc.RpcError as error:
            reason = error.details() or error.code().name
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise ConfigError(f"{name}: {reason}") from None
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                text = "its certificate does not name the host by which it is called"
                raise ConfigError(f"{name}: TLS: {text}: {reason}") from None
            if any(words in reason.lower() for words in UNTRUSTED):
                raise ConfigError(f"{name}: TLS: the certificates do not fit: {reason}") from None
        now = time.monotonic()
        if now > deadline or given_up.wait(JOIN_PAUSE):
            hint = HUNG_UP if "socket closed" in reason.lower() else ""
            raise WorkerGroupError(f"{name} is not there: {reason}{hint}")
        if now - told > TELL_EVERY:
            told = now
            log.info("waiting for %s: %s", name, reason)


def _is_done(call: grpc.Future, seconds: float) -> bool:
    """Waits so long at most."""
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
