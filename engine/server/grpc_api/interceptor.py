"""gRPC interceptor: authentication, request parsing, timeouts and error mapping."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from ...errors import RequestError
from ...observability.rejection_log import API_KEY, RejectionLog
from ...utils.readers import AT_ONCE, read
from ..api_keys import ApiKeys
from ..drain import CallTracker
from ..errors import RequestRejected, error_info
from .status import abort
from .wire_check import TooManyFields, check_wire

log = logging.getLogger("octavo.server")

OPEN = "/grpc.health.v1.Health/"  # no key required: used by load balancers
MESSAGE_TIMEOUT = 1800.0  # seconds to receive a request message of up to 256 MiB
OPEN_MESSAGE_TIMEOUT = 5.0  # the same for services without authentication
_ends: set[asyncio.Future[Any]] = set()  # keeps references: the event loop holds only weak ones

Continue = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]]


class ApiInterceptor(grpc.aio.ServerInterceptor):
    """Interceptor of all services.

    It reads and writes the messages itself, so that both have a timeout.
    """

    def __init__(self, keys: ApiKeys | None, rejections: RejectionLog, work: CallTracker) -> None:
        self._keys, self._rejections, self._work = keys, rejections, work

    async def intercept_service(
        self, continuation: Continue, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        is_open = details.method.startswith(OPEN)
        if self._keys is not None and not is_open:
            given = dict(details.invocation_metadata).get("authorization")
            if not self._keys.accept(given):
                return _rejecting_handler(self._keys.fault(given), self._rejections)
        handler = await continuation(details)
        if handler is None:  # unknown method; gRPC reports it
            return None
        timeout = OPEN_MESSAGE_TIMEOUT if is_open else MESSAGE_TIMEOUT
        return _bounded(handler, self._work, timeout)


def _rejecting_handler(fault: RequestError, rejections: RejectionLog) -> grpc.RpcMethodHandler:
    """Return a handler that rejects the call without reading its messages."""

    async def reject(messages: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        rejections.add(API_KEY, context.peer())
        await abort(context, fault)
        yield b""

    return grpc.stream_stream_rpc_method_handler(reject)


def _bounded(
    handler: grpc.RpcMethodHandler, work: CallTracker, timeout: float
) -> grpc.RpcMethodHandler:
    """Wrap any handler as a stream-stream handler with timeouts.

    On the wire, a single message and a stream of one message are the same.
    """

    async def answer(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        async with told(context):
            responses = _responses(handler, messages, context, timeout)
            async with contextlib.aclosing(responses):
                async for response in responses:
                    await _send(context, work, serialized(response))

    return grpc.stream_stream_rpc_method_handler(answer)


async def _responses(
    handler: grpc.RpcMethodHandler,
    messages: AsyncIterator[bytes],
    context: grpc.aio.ServicerContext,
    timeout: float,
) -> AsyncGenerator[Any, None]:
    if handler.request_streaming:  # only the reflection service
        requests = (await _parsed(handler, each) async for each in messages)
        async for response in handler.stream_stream(requests, context):
            yield response
        return
    request = await _parsed(handler, await _receive(messages, timeout))
    if not handler.response_streaming:
        yield await handler.unary_unary(request, context)
        return
    async with contextlib.aclosing(handler.unary_stream(request, context)) as stream:
        async for response in stream:
            yield response


async def _receive(messages: AsyncIterator[bytes], timeout: float) -> bytes:
    """Return the request message of a call. Raises `RequestRejected`."""
    try:
        async with asyncio.timeout(timeout):
            return await anext(messages)
    except TimeoutError:
        text = f"the message was not received within {timeout:g} s; send smaller media, or URLs"
        raise RequestRejected("DEADLINE_EXCEEDED", text) from None
    except StopAsyncIteration:
        raise RequestRejected(
            "INVALID_ARGUMENT", "the call has no request message; send one"
        ) from None


async def _send(context: grpc.aio.ServicerContext, work: CallTracker, response: bytes) -> None:
    """Send a response. Raises CancelledError if the client does not read or has disconnected."""
    try:
        await work.send(context.write(response))
    except TimeoutError:
        text = f"the response was not read for {work.send_timeout:g} s"
        # The status is sent when the client reads again; do not wait for that.
        end = asyncio.ensure_future(abort(context, RequestError("DEADLINE_EXCEEDED", text)))
        _ends.add(end)
        end.add_done_callback(_forget)
        raise asyncio.CancelledError from None
    except grpc.aio.InternalError:  # the client has disconnected
        raise asyncio.CancelledError from None


def serialized(response: Message | bytes) -> bytes:
    """Return the bytes of a response that a servicer may have serialized itself."""
    return response if isinstance(response, bytes) else response.SerializeToString()


def _forget(end: asyncio.Future[Any]) -> None:
    _ends.discard(end)
    if not end.cancelled():
        end.exception()  # always AbortError; marks it as retrieved


async def _parsed(handler: grpc.RpcMethodHandler, data: bytes) -> Any:
    """Parse a request message. Raises `RequestRejected`.

    gRPC's own parsing would send the text of protobuf's exception to the client.
    """
    return await read(functools.partial(_parse, handler, data), len(data) > AT_ONCE)


def _parse(handler: grpc.RpcMethodHandler, data: bytes) -> Any:
    kind = getattr(handler.request_deserializer, "__self__", None)
    try:
        if kind is not None:
            check_wire(data, kind.DESCRIPTOR)
        return handler.request_deserializer(data)
    except TooManyFields as error:
        raise RequestRejected("INVALID_ARGUMENT", str(error)) from None
    except DecodeError:
        text = f"the message ({len(data)} bytes) is not valid protobuf for this method"
        raise RequestRejected("INVALID_ARGUMENT", text) from None


@contextlib.asynccontextmanager
async def told(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Convert exceptions to a gRPC status."""
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except NotImplementedError:  # declared by a library's service but not implemented
        await abort(context, RequestError("UNIMPLEMENTED", "the method is not implemented"))
    except Exception as error:
        fault = error_info(error)
        if fault.code == "INTERNAL":
            log.exception("a call failed")
        await abort(context, fault)
