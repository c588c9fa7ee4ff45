"""Run a gRPC servicer's method for one call, without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from ...proto import octavo_pb2 as pb
from ..errors import RequestError
from ..server.api_keys import ApiKeys
from ..server.errors import RequestRejected, error_info
from ..server.grpc_api.interceptor import serialized
from ..server.grpc_api.status import DETAILS, details_of, short
from .calls import GrpcCall, GrpcEnd

log = logging.getLogger("octavo.server")

# Request types by method. Other methods of octavo.v1 make sense only for a single server.
METHODS: dict[str, Any] = {
    "Generate": pb.GenerateRequest,
    "GenerateOnce": pb.GenerateRequest,
    "Tokenize": pb.TokenizeRequest,
    "Detokenize": pb.DetokenizeRequest,
    "GetModelInfo": pb.GetModelInfoRequest,
    "GetServerInfo": pb.GetServerInfoRequest,
}


class _Aborted(Exception):
    """The servicer has aborted its call."""


@dataclass
class _Context:
    """The part of grpc.aio.ServicerContext that the servicers use."""

    call: GrpcCall
    end: GrpcEnd | None = None
    done_callbacks: list[Callable[[Any], None]] = field(default_factory=list)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.done_callbacks.append(callback)

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.call.metadata

    def time_remaining(self) -> float | None:
        """Return None: the proxy cancels calls whose deadline has passed."""
        return None

    async def abort(
        self, code: grpc.StatusCode, text: str, trailing_metadata: Any = ()
    ) -> NoReturn:
        self.end = GrpcEnd(code.name, text, tuple(trailing_metadata))
        raise _Aborted


async def run_grpc(
    servicer: Any, call: GrpcCall, keys: ApiKeys | None
) -> AsyncGenerator[bytes | GrpcEnd, None]:
    """Yield the response messages, and a `GrpcEnd` after an error. Closing it cancels the call."""
    context = _Context(call)
    try:
        check_key(dict(call.metadata), keys)
        answer = getattr(servicer, call.method)(_parsed(call), context)
        if not hasattr(answer, "__aiter__"):
            yield serialized(await answer)
            return
        async with contextlib.aclosing(answer):
            async for message in answer:
                yield serialized(message)
    except _Aborted:
        assert context.end is not None
        yield context.end
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except Exception as error:
        fault = error_info(error)
        if fault.code == "INTERNAL":
            log.exception("a call failed")
        yield end_of(fault)
    finally:
        for callback in context.done_callbacks:
            callback(context)


def end_of(fault: RequestError) -> GrpcEnd:
    text = short(fault.message)
    details = ((DETAILS, details_of(fault, text).SerializeToString()),)
    return GrpcEnd(fault.code, text, details)


def check_key(metadata: Mapping[str, str | bytes], keys: ApiKeys | None) -> None:
    """Raise `RequestRejected` for a missing or invalid API key."""
    given = metadata.get("authorization")
    if keys is not None and not keys.accept(given):
        fault = keys.fault(given)
        raise RequestRejected(fault.code, fault.message, fault.field)


def _parsed(call: GrpcCall) -> Any:
    try:
        return METHODS[call.method].FromString(call.message)
    except DecodeError:
        text = f"the message ({len(call.message)} bytes) is not valid protobuf for this method"
        raise RequestRejected("INVALID_ARGUMENT", text) from None
