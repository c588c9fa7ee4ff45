"""What every call passes, whatever its service: its key, its bytes, its errors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ...observability.rejection_log import API_KEY, RejectionLog
from ..api_keys import ApiKeys
from ..drain import CallTracker
from ..errors import ErrorInfo, RequestRejected, error_info
from ..readers import AT_ONCE, read
from .status import abort
from .wire_check import TooManyFields, check_wire

log = logging.getLogger("octavo.server")

OPEN = "/grpc.health.v1.Health/"  # for load balancers, which have no key
MESSAGE_TIMEOUT = 1800.0  # seconds for a call's one message of up to 256 MiB to arrive
OPEN_MESSAGE_TIMEOUT = 5.0  # the same where no key is needed
_ends: set[asyncio.Future[Any]] = set()  # the event loop itself keeps no task alive

Continue = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]]


class ApiInterceptor(grpc.aio.ServerInterceptor):
    """One interceptor over every service. It reads and writes the messages itself, which bounds
    the time of both."""

    def __init__(self, keys: ApiKeys | None, rejections: RejectionLog, work: CallTracker) -> None:
        self._keys, self._rejections, self._work = keys, rejections, work

    async def intercept_service(
        self, continuation: Continue, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        is_open = details.method.startswith(OPEN)
        if self._keys is not None and not is_open:
            given = dict(details.invocation_metadata).get("authorization")
            if not self._keys.accept(given):
                return _refusal(self._keys.fault(given), self._rejections)
        handler = await continuation(details)
        if handler is None:  # gRPC says so
            return None
        timeout = OPEN_MESSAGE_TIMEOUT if is_open else MESSAGE_TIMEOUT
        return _bounded(handler, self._work, timeout)


def _refusal(fault: ErrorInfo, rejections: RejectionLog) -> grpc.RpcMethodHandler:
    """Of a call whose messages nobody reads."""

    async def refuse(messages: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        rejections.add(API_KEY, context.peer())
        await abort(context, fault)
        yield b""

    return grpc.stream_stream_rpc_method_handler(refuse)


def _bounded(
    handler: grpc.RpcMethodHandler, work: CallTracker, timeout: float
) -> grpc.RpcMethodHandler:
    """Return `handler` for streams of messages on both sides, whatever its own kind is: on the
    wire a single message is the same."""

    async def answer(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        async with told(context):
            responses = _responses(handler, messages, context, timeout)
            async with contextlib.aclosing(responses):
                async for response in responses:
                    await _send(context, work, response)

    return grpc.stream_stream_rpc_method_handler(
        answer, response_serializer=handler.response_serializer
    )


async def _responses(
    handler: grpc.RpcMethodHandler,
    messages: AsyncIterator[bytes],
    context: grpc.aio.ServicerContext,
    timeout: float,
) -> AsyncGenerator[Any, None]:
    if handler.request_streaming:  # only reflection takes a stream
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
    """Return the one message of a call. Raises `RequestRejected`."""
    try:
        async with asyncio.timeout(timeout):
            return await anext(messages)
    except TimeoutError:
        text = f"the message was not received within {timeout:g} s; send smaller media, or URLs"
        raise RequestRejected("DEADLINE_EXCEEDED", text) from None
    except StopAsyncIteration:
        raise RequestRejected("INVALID_ARGUMENT", "the call has no message; send one") from None


async def _send(context: grpc.aio.ServicerContext, work: CallTracker, response: Any) -> None:
    """Raises CancelledError where the client does not read, or has gone."""
    try:
        await work.send(context.write(response))
    except TimeoutError:
        text = f"the response was not read for {work.send_timeout:g} s"
        # Sent when the client reads again; nothing waits for that.
        end = asyncio.ensure_future(abort(context, ErrorInfo("DEADLINE_EXCEEDED", text)))
        _ends.add(end)
        end.add_done_callback(_forget)
        raise asyncio.CancelledError from None
    except grpc.aio.InternalError:  # it could not be sent
        raise asyncio.CancelledError from None


def _forget(end: asyncio.Future[Any]) -> None:
    _ends.discard(end)
    if not end.cancelled():
        end.exception()  # AbortError, always


async def _parsed(handler: grpc.RpcMethodHandler, data: bytes) -> Any:
    """Return the request's message. Raises `RequestRejected`, where gRPC itself would return the
    text of protobuf's exception."""
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
        text = f"the message's {len(data)} bytes are not the protobuf that the method takes"
        raise RequestRejected("INVALID_ARGUMENT", text) from None


@contextlib.asynccontextmanager
async def told(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Ends the call with the status of what is raised within."""
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except NotImplementedError:  # a method that a library's service declares only
        await abort(context, ErrorInfo("UNIMPLEMENTED", "the method is not implemented"))
    except Exception as error:
        fault = error_info(error)
        if fault.code == "INTERNAL":
            log.exception("a call failed")
        await abort(context, fault)
