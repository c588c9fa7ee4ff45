"""The public gRPC server: `octavo.v1.Inference` and `grpc.health.v1`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ...proto import octavo_pb2 as pb
from ...proto import octavo_pb2_grpc
from ...scheduler.admission import QueueFull
from ...scheduler.params import SamplingParams
from ..async_llm import AsyncLLM
from ..engine import DuplicateRequest, EngineDead
from ..input_error import InputError
from .convert import read_options, read_prompt, read_sampling, write_delta

if TYPE_CHECKING:  # the extra octavo[http] may not be installed
    from .http_server import HttpServer

log = logging.getLogger("octavo.server")

SERVICE = "octavo.v1.Inference"
MAX_MESSAGE_BYTES = 256 << 20
MAX_REQUEST_ID = 256  # characters
MAX_ERROR_TEXT = 2000  # characters; gRPC drops a status whose text is over some 8,000 bytes
NO_ADDRESS = "the address is in use or not this machine's"
GRACE = 10.0  # seconds that running requests get when the server is asked to stop

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping as often as this; gRPC's default of five minutes cuts long prefills off.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not half of the clients lost
]


class InferenceServicer(octavo_pb2_grpc.InferenceServicer):
    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._num_active = 0
        self.idle = asyncio.Event()  # no Generate call is running
        self.idle.set()

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateDelta]:
        """Streams deltas. gRPC cancels this coroutine when its client goes away, which closes the
        stream, which aborts the request."""
        self._num_active += 1
        self.idle.clear()
        try:
            async for delta in self._generate(request, context):
                yield delta
        finally:
            self._num_active -= 1
            if self._num_active == 0:
                self.idle.set()

    async def _generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateDelta]:
        try:
            if len(request.request_id) > MAX_REQUEST_ID:
                raise InputError("request_id", f"over {MAX_REQUEST_ID} characters")
            prompt, params = read_prompt(request), read_sampling(request.sampling)
            options = read_options(request, context.time_remaining())
            stream = self._engine.generate(
                prompt, params, request_id=request.request_id or None, **options
            )
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    yield write_delta(delta)
                    if delta.error and delta.usage is not None:  # all answers have ended
                        await context.abort(*status_of_failure(delta.error))
        except (ValueError, EngineDead) as error:
            await context.abort(status_of(error), _short(str(error)))
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            log.exception("request %r failed", request.request_id)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has it")

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortReply:
        return pb.AbortReply(found=await self._engine.abort(request.request_id))


def _short(text: str) -> str:
    return text if len(text) <= MAX_ERROR_TEXT else text[:MAX_ERROR_TEXT] + "…"


def status_of(error: ValueError | EngineDead) -> grpc.StatusCode:
    if isinstance(error, EngineDead):
        return grpc.StatusCode.UNAVAILABLE
    if isinstance(error, QueueFull):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, DuplicateRequest):
        return grpc.StatusCode.ALREADY_EXISTS
    return grpc.StatusCode.INVALID_ARGUMENT  # InputError, AdmissionError, sampling values


def status_of_failure(error: str) -> tuple[grpc.StatusCode, str]:
    """Code and text of a request that failed after admission: its error may begin with a code."""
    code, _, text = error.partition(": ")
    if code in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "INTERNAL"):
        return grpc.StatusCode[code], _short(text)
    return grpc.StatusCode.INTERNAL, _short(error)


def check_address(host: str, port: int) -> None:
    """Raises OSError when nothing could listen there: asked before a model is loaded."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
                probe.bind(address)
    except OSError:
        raise OSError(f"{host}:{port}: {NO_ADDRESS}") from None


async def serve(
    engine: AsyncLLM,
    host: str,
    port: int,
    on_ready: Callable[[str, str], None],
    http: HttpServer | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT (returns 0) or until the worker group dies (returns 1).

    `http`: the other door, if it is wanted. `on_ready` is called once with the HOST:PORT of gRPC
    and of HTTP ("" without), after a first step has run. Raises OSError when an address cannot be
    taken.
    """
    server = grpc.aio.server(options=OPTIONS)
    servicer = InferenceServicer(engine)
    octavo_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    address = f"[{host}]" if ":" in host else host
    try:
        port = server.add_insecure_port(f"{address}:{port}")
    except RuntimeError:
        raise OSError(f"{host}:{port}: {NO_ADDRESS}") from None
    asked_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_stop.set)
    await _warm_up(engine)
    await _set_health(health_servicer, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    on_ready(f"{address}:{port}", await http.start() if http else "")
    died = await _wait(engine, asked_to_stop)
    await _set_health(health_servicer, health_pb2.HealthCheckResponse.NOT_SERVING)
    if died:
        log.error("the engine stopped: %s", died)
    grace = 1.0 if died else GRACE
    await asyncio.gather(_drain(server, servicer, grace), *([http.drain(grace)] if http else []))
    return 1 if died else 0


async def _drain(server: grpc.aio.Server, servicer: InferenceServicer, grace: float) -> None:
    """Running requests get `grace` seconds; an open health watch is not waited for."""
    stopping = asyncio.create_task(server.stop(grace))
    idle = asyncio.create_task(servicer.idle.wait())
    await asyncio.wait({stopping, idle}, return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()
    await asyncio.sleep(0.1)  # the last request's status is still to be sent
    await server.stop(None)
    await stopping


async def _warm_up(engine: AsyncLLM) -> None:
    """One step before anybody waits for one."""
    params = SamplingParams(temperature=0, max_tokens=1)
    with contextlib.suppress(ValueError):  # a max_model_len of one token
        async for _ in engine.generate({"prompt_token_ids": [0]}, params):
            pass


async def _wait(engine: AsyncLLM, asked_to_stop: asyncio.Event) -> str:
    """Until a signal (gives "") or the engine's death (gives the cause)."""
    death = asyncio.create_task(engine.wait_failed())
    signalled = asyncio.create_task(asked_to_stop.wait())
    await asyncio.wait({death, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if death.done():
        return death.result()
    death.cancel()
    log.info("stopping; running requests get %.0f s", GRACE)
    return ""


async def _set_health(servicer: health.aio.HealthServicer, status: int) -> None:
    for service in ("", SERVICE):
        await servicer.set(service, status)


def ready_line(engine: AsyncLLM, address: str, http_address: str = "") -> str:
    """The one line on stdout; worker_pids in rank order."""
    pids = ",".join(map(str, engine.worker_pids))
    http = f" http={http_address}" if http_address else ""
    return f"ready grpc={address}{http} pid={os.getpid()} worker_pids={pids}"
