"""What every call passes, whatever its service: its key, its bytes, its errors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from .errors import Fault, Refused, fault_of
from .key_refusals import KeyRefusals
from .keys import ApiKeys
from .readers import AT_ONCE, read
from .status import abort
from .wire_check import TooManyFields, check_wire

log = logging.getLogger("octavo.server")

OPEN = "/grpc.health.v1.Health/"  # for load balancers, which have no key
Continue = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]]


class Door(grpc.aio.ServerInterceptor):
    """One interceptor over every service."""

    def __init__(self, keys: ApiKeys | None, refusals: KeyRefusals) -> None:
        self._keys, self._refusals = keys, refusals

    async def intercept_service(
        self, continuation: Continue, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        if self._keys is not None and not details.method.startswith(OPEN):
            given = dict(details.invocation_metadata).get("authorization")
            if not self._keys.accept(given):
                return _refusal(self._keys.fault(given), self._refusals)
        handler = await continuation(details)
        if handler is None:  # gRPC says so
            return None
        if handler.request_streaming:
            return _stream_stream(handler)
        return _unary_stream(handler) if handler.response_streaming else _unary_unary(handler)


def _refusal(fault: Fault, refusals: KeyRefusals) -> grpc.RpcMethodHandler:
    """Of a call whose messages nobody reads."""

    async def refuse(messages: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        refusals.add(context.peer())
        await abort(context, fault)
        yield b""

    return grpc.stream_stream_rpc_method_handler(refuse)


def _unary_unary(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    async def answer(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        async with told(context):
            return await handler.unary_unary(await _parsed(handler, data), context)

    return grpc.unary_unary_rpc_method_handler(
        answer, response_serializer=handler.response_serializer
    )


def _unary_stream(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    async def answer(data: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async with told(context):
            stream = handler.unary_stream(await _parsed(handler, data), context)
            if not hasattr(stream, "__aiter__"):  # a coroutine that writes, as health's Watch
                await stream
                return
            async with contextlib.aclosing(stream):
                async for message in stream:
                    yield message

    return grpc.unary_stream_rpc_method_handler(
        answer, response_serializer=handler.response_serializer
    )


def _stream_stream(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """Reflection's; no service of ours takes a stream."""

    async def answer(
        data: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Any]:
        async with told(context):
            messages = (await _parsed(handler, each) async for each in data)
            async for message in handler.stream_stream(messages, context):
                yield message

    return grpc.stream_stream_rpc_method_handler(
        answer, response_serializer=handler.response_serializer
    )


async def _parsed(handler: grpc.RpcMethodHandler, data: bytes) -> Any:
    """Return the request's message. Raises `Refused`: gRPC itself would return what protobuf
    raised."""
    return await read(functools.partial(_parse, handler, data), len(data) > AT_ONCE)


def _parse(handler: grpc.RpcMethodHandler, data: bytes) -> Any:
    kind = getattr(handler.request_deserializer, "__self__", None)
    try:
        if kind is not None:
            check_wire(data, kind.DESCRIPTOR)
        return handler.request_deserializer(data)
    except TooManyFields as error:
        raise Refused("INVALID_ARGUMENT", str(error)) from None
    except DecodeError:
        text = f"the message's {len(data)} bytes are not the protobuf that the method takes"
        raise Refused("INVALID_ARGUMENT", text) from None


@contextlib.asynccontextmanager
async def told(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Ends the call with the status of what is raised within."""
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception as error:
        fault = fault_of(error)
        if fault.code == "INTERNAL":
            log.exception("a call failed")
        await abort(context, fault)
