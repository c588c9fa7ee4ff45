"""The public gRPC server: its services, its address, its begin and its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ....proto import octavo_pb2_grpc
from ....scheduler.params import SamplingParams
from ...async_llm import AsyncLLM
from ...observability.rejection_log import RejectionLog
from ...utils.tls import TlsFiles, server_credentials
from ..api_keys import ApiKeys
from ..connections import connections_that_fit
from ..drain import CallTracker
from .control import ControlServicer
from .health import HealthServicer
from .inference import InferenceServicer
from .interceptor import ApiInterceptor

if TYPE_CHECKING:  # the extra octavo[http] may not be installed
    from ..http_api.server import HttpServer

log = logging.getLogger("octavo.server")

SERVICES = ("octavo.v1.Inference", "octavo.v1.Control")
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
MAX_MESSAGE_BYTES = 256 << 20
NO_ADDRESS = "the address is in use or not this machine's"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 10.0  # seconds that running requests get when the server is asked to stop
SHUTDOWN_GRACE = 4.0  # seconds then for them to be ended, and told so
HEALTH_CHECK = 1.0  # seconds between two looks at whether the workers are there

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping as often as this; gRPC's default of five minutes cuts long prefills off.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Connections that send nothing, or make no calls; clients connect again by themselves.
    ("grpc.server_handshake_timeout_ms", 20_000),  # TLS, then HTTP/2's settings
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_concurrent_streams", 4096),  # of one connection
    ("grpc.so_reuseport", 0),  # a port in use is an error, not half of the clients lost
]


@dataclass
class GrpcServer:
    """All services of one engine, before anybody listens."""

    server: grpc.aio.Server
    health: HealthServicer
    work: CallTracker

    async def set_health(self, status: int) -> None:
        for service in ("", *SERVICES):
            self.health.set(service, NOT_SERVING if self.work.is_draining else status)


def make_server(engine: AsyncLLM, keys: ApiKeys | None = None) -> GrpcServer:
    """To be called in the event loop that serves."""
    work = CallTracker()
    door = ApiInterceptor(keys, RejectionLog(engine.engine.stats), work)
    limit = ("grpc.max_allowed_incoming_connections", connections_that_fit())
    server = grpc.aio.server(options=[*OPTIONS, limit], interceptors=[door])
    made = GrpcServer(server, HealthServicer(), work)
    control = ControlServicer(
        engine, work, lambda: made.set_health(NOT_SERVING), has_api_keys=keys is not None
    )
    octavo_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(engine, work), server)
    octavo_pb2_grpc.add_ControlServicer_to_server(control, server)
    health_pb2_grpc.add_HealthServicer_to_server(made.health, server)
    names = (*SERVICES, HEALTH, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return made


def check_address(host: str, port: int, flag: str) -> None:
    """Raises OSError, which names the flag that `port` came by, when nothing could listen there:
    asked before a model is loaded."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
                probe.bind(address)
    except OSError:
        raise OSError(f"{flag} {port}: {host}:{port}: {NO_ADDRESS}; choose another") from None


async def serve(
    engine: AsyncLLM,
    host: str,
    port: int,
    on_ready: Callable[[str, str], None],
    keys: ApiKeys | None = None,
    tls: TlsFiles | None = None,
    http: HttpServer | None = None,
) -> int:
    """Serves until SIGTERM, SIGINT or SIGHUP (returns 0), or until the worker group dies (returns
    1). A second signal ends without waiting for running requests.

    `http`: the other door, if it is wanted. `on_ready` is called once with the HOST:PORT of gRPC
    and of HTTP ("" without), after a first step has run. Raises OSError when an address cannot be
    taken.
    """
    made = make_server(engine, keys)
    address = f"[{host}]" if ":" in host else host
    port = listen(made.server, f"{address}:{port}", tls)
    asked_to_stop, asked_again = _signals()
    if not await _warmed_up(engine, asked_to_stop):
        return 0
    _spare_collector()
    await made.set_health(SERVING)
    watching = asyncio.create_task(_tell_health(made, engine))
    await made.server.start()
    on_ready(f"{address}:{port}", await http.start(engine, made.work) if http else "")
    died = await _wait(engine, asked_to_stop)
    watching.cancel()
    await made.set_health(NOT_SERVING)
    if died:
        log.error("the engine stopped: %s", died)
    await _stop(made, http, engine, 1.0 if died else GRACE, asked_again)
    return 1 if died else 0


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Return the events of the first and the second signal to stop. SIGHUP (a terminal that is
    closed) is one of them, but not under `nohup`."""
    first, second = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (second if first.is_set() else first).set()

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, stop)
    return first, second


def listen(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    """The port; TLS where `tls` says so. Raises OSError when the address cannot be taken."""
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, server_credentials(tls))
    except RuntimeError:
        raise OSError(f"{address}: {NO_ADDRESS}") from None


async def _stop(
    made: GrpcServer,
    http: HttpServer | None,
    engine: AsyncLLM,
    grace: float,
    asked_again: asyncio.Event,
) -> None:
    """Give running requests `grace` seconds, or until a second signal; then let the engine end the
    rest, so that each client gets a status. Do not wait for open health watches, nor for clients
    that do not read their responses."""
    made.work.hurry()
    stopping = asyncio.create_task(made.server.stop(grace + SHUTDOWN_GRACE))
    if await _drained(made.work, grace, asked_again):
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.wait({closing}, timeout=SHUTDOWN_GRACE / 2)
        await made.work.drain(SHUTDOWN_GRACE / 2)
    await asyncio.sleep(0.1)  # the last request's status is still to be sent
    await asyncio.gather(made.server.stop(None), *([http.drain(0.0)] if http else []))
    await stopping


async def _drained(work: CallTracker, grace: float, asked_again: asyncio.Event) -> int:
    """Return how many requests are left when the time or the operator's patience is over."""
    drained = asyncio.create_task(work.drain(grace))
    again = asyncio.create_task(asked_again.wait())
    await asyncio.wait({drained, again}, return_when=asyncio.FIRST_COMPLETED)
    if again.done():
        log.info("stopping at once: a second signal came")
    for task in (drained, again):
        task.cancel()
    await asyncio.wait({drained, again})
    return work.num_running


def _spare_collector() -> None:
    """What is there before the first request stays for good. The garbage collector is not to go
    through it again and again while streams run, which would stop them for tenths of seconds."""
    gc.collect()
    gc.freeze()
    gc.collect()  # resets the size that a full collection has to exceed a quarter of


async def warm_up(engine: AsyncLLM) -> None:
    """One step before anybody waits for one; the metrics do not count it."""
    params = SamplingParams(temperature=0, max_tokens=1)
    await asyncio.to_thread(engine.engine.grammars.warm)  # else the first form holds everyone up
    with contextlib.suppress(ValueError):  # a max_model_len of one token
        async for _ in engine.generate({"prompt_token_ids": [0]}, params):
            pass
    while engine.engine.has_steps and not engine.failed:  # of a token that nobody reads
        await asyncio.sleep(0.001)
    engine.engine.stats.start_over()


async def _warmed_up(engine: AsyncLLM, asked_to_stop: asyncio.Event) -> bool:
    """False where the server is to stop before it has."""
    warming = asyncio.create_task(warm_up(engine))
    signalled = asyncio.create_task(asked_to_stop.wait())
    await asyncio.wait({warming, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if warming.done():
        warming.result()  # or what it raised
        return True
    warming.cancel()
    await asyncio.wait({warming})
    return False


async def _tell_health(made: GrpcServer, engine: AsyncLLM) -> None:
    """NOT_SERVING while the workers are away for long: requests wait for them."""
    was_away = False
    while not made.work.is_draining:
        is_away = engine.engine.restarts.is_long
        if is_away != was_away:
            await made.set_health(NOT_SERVING if is_away else SERVING)
            was_away = is_away
        await asyncio.sleep(HEALTH_CHECK)


async def _wait(engine: AsyncLLM, asked_to_stop: asyncio.Event) -> str:
    """Until a signal (gives "") or the engine's death (gives the cause)."""
    death = asyncio.create_task(engine.wait_failed())
    signalled = asyncio.create_task(asked_to_stop.wait())
    await asyncio.wait({death, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if death.done():
        return death.result()
    death.cancel()
    engine.engine.group.give_up()  # they are told to stop too, perhaps
    log.info("stopping; running requests get %.0f s", GRACE)
    return ""


def ready_line(engine: AsyncLLM, address: str, http_address: str = "") -> str:
    """The one line on stdout; worker_pids in rank order."""
    pids = ",".join(map(str, engine.worker_pids))
    http = f" http={http_address}" if http_address else ""
    return f"ready grpc={address}{http} pid={os.getpid()} worker_pids={pids}"
