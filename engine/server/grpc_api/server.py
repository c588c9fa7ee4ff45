"""The public gRPC server: services, listening address, startup and shutdown."""

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
NO_ADDRESS = "the address is in use or does not belong to this machine"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 10.0  # seconds for running requests to finish after a stop signal
SHUTDOWN_GRACE = 4.0  # seconds after that to abort them and send their statuses
HEALTH_CHECK = 1.0  # seconds between checks of whether the workers are running

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Minimum ping interval of clients; gRPC's default of five minutes disconnects long prefills.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Close connections that send nothing or make no calls; clients reconnect automatically.
    ("grpc.server_handshake_timeout_ms", 20_000),  # TLS, then HTTP/2's settings
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_concurrent_streams", 4096),  # per connection
    ("grpc.so_reuseport", 0),  # else a second server on the port takes half of the clients
]


@dataclass
class GrpcServer:
    """The gRPC server of one engine, not listening yet."""

    server: grpc.aio.Server
    health: HealthServicer
    work: CallTracker

    async def set_health(self, status: int) -> None:
        for service in ("", *SERVICES):
            self.health.set(service, NOT_SERVING if self.work.is_draining else status)


def make_server(engine: AsyncLLM, keys: ApiKeys | None = None) -> GrpcServer:
    """Create the server. Call it in the event loop that serves."""
    work = CallTracker()
    interceptor = ApiInterceptor(keys, RejectionLog(engine.engine.stats), work)
    limit = ("grpc.max_allowed_incoming_connections", connections_that_fit())
    server = grpc.aio.server(options=[*OPTIONS, limit], interceptors=[interceptor])
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
    """Raise OSError if the address cannot be bound, to fail before the model is loaded.

    `flag`: the command line option of `port`, for the error.
    """
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
    """Serve until a stop signal (return 0) or until the engine fails (return 1).

    Stop signals are SIGTERM, SIGINT and SIGHUP. A second one stops without waiting for running
    requests.

    `http`: an HTTP server to run as well. `on_ready` is called once, after a warm-up step, with the
    HOST:PORT of gRPC and of HTTP ("" without). Raises OSError if an address cannot be bound.
    """
    made = make_server(engine, keys)
    address = f"[{host}]" if ":" in host else host
    port = listen(made.server, f"{address}:{port}", tls)
    stop_signal, second_signal = _signals()
    if not await _warmed_up(engine, stop_signal):
        return 0
    _freeze_garbage_collector()
    await made.set_health(SERVING)
    watching = asyncio.create_task(_tell_health(made, engine))
    await made.server.start()
    on_ready(f"{address}:{port}", await http.start(engine, made.work) if http else "")
    died = await _wait(engine, stop_signal)
    watching.cancel()
    await made.set_health(NOT_SERVING)
    if died:
        log.error("the engine stopped: %s", died)
    await _stop(made, http, engine, 1.0 if died else GRACE, second_signal)
    return 1 if died else 0


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Return the events of the first and the second stop signal.

    SIGHUP (the terminal was closed) counts, except under `nohup`.
    """
    first, second = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (second if first.is_set() else first).set()

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, stop)
    return first, second


def listen(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    """Bind the server and return the port. Raises OSError if the address cannot be bound."""
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
    second_signal: asyncio.Event,
) -> None:
    """Stop the server: wait for running requests, then abort the rest.

    Running requests get `grace` seconds, or until a second signal. The engine ends the rest, so
    that each client gets a status. Open health watches and clients that do not read are not waited
    for.
    """
    made.work.hurry()
    stopping = asyncio.create_task(made.server.stop(grace + SHUTDOWN_GRACE))
    if await _drained(made.work, grace, second_signal):
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.wait({closing}, timeout=SHUTDOWN_GRACE / 2)
        await made.work.drain(SHUTDOWN_GRACE / 2)
    await asyncio.sleep(0.1)  # time to send the last request's status
    await asyncio.gather(made.server.stop(None), *([http.drain(0.0)] if http else []))
    await stopping


async def _drained(work: CallTracker, grace: float, second_signal: asyncio.Event) -> int:
    """Return how many requests are left after `grace` seconds or a second signal."""
    drained = asyncio.create_task(work.drain(grace))
    again = asyncio.create_task(second_signal.wait())
    await asyncio.wait({drained, again}, return_when=asyncio.FIRST_COMPLETED)
    if again.done():
        log.info("received a second signal; stopping immediately")
    for task in (drained, again):
        task.cancel()
    await asyncio.wait({drained, again})
    return work.num_running


def _freeze_garbage_collector() -> None:
    """Exclude all current objects from garbage collection.

    They live as long as the server, and each full collection would pause streams for tenths of
    seconds.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # resets the size that a full collection has to exceed a quarter of


async def warm_up(engine: AsyncLLM) -> None:
    """Run one step before the first request. Metrics do not count it."""
    params = SamplingParams(temperature=0, max_tokens=1)
    await asyncio.to_thread(
        engine.engine.grammars.warm
    )  # else the first structured request delays all others
    with contextlib.suppress(ValueError):  # max_model_len is one token
        async for _ in engine.generate({"prompt_token_ids": [0]}, params):
            pass
    while (
        engine.engine.has_steps and not engine.failed
    ):  # a step may be in flight for a token that is not needed
        await asyncio.sleep(0.001)
    engine.engine.stats.start_over()


async def _warmed_up(engine: AsyncLLM, stop_signal: asyncio.Event) -> bool:
    """Warm up. Return False if a stop signal came first."""
    warming = asyncio.create_task(warm_up(engine))
    signalled = asyncio.create_task(stop_signal.wait())
    await asyncio.wait({warming, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if warming.done():
        warming.result()  # raises if it failed
        return True
    warming.cancel()
    await asyncio.wait({warming})
    return False


async def _tell_health(made: GrpcServer, engine: AsyncLLM) -> None:
    """Report NOT_SERVING while a worker restart takes long; requests wait meanwhile."""
    was_away = False
    while not made.work.is_draining:
        is_away = engine.engine.restarts.is_long
        if is_away != was_away:
            await made.set_health(NOT_SERVING if is_away else SERVING)
            was_away = is_away
        await asyncio.sleep(HEALTH_CHECK)


async def _wait(engine: AsyncLLM, stop_signal: asyncio.Event) -> str:
    """Wait for a stop signal (return "") or the engine's failure (return the cause)."""
    death = asyncio.create_task(engine.wait_failed())
    signalled = asyncio.create_task(stop_signal.wait())
    await asyncio.wait({death, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if death.done():
        return death.result()
    death.cancel()
    # The workers may have received the signal too; do not restart them.
    engine.engine.group.give_up()
    log.info("stopping; waiting up to %.0f s for running requests", GRACE)
    return ""


def ready_line(engine: AsyncLLM, address: str, http_address: str = "") -> str:
    """Return the only line printed to stdout. worker_pids are in rank order."""
    pids = ",".join(map(str, engine.worker_pids))
    http = f" http={http_address}" if http_address else ""
    return f"ready grpc={address}{http} pid={os.getpid()} worker_pids={pids}"
