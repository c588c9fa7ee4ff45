"""Ingress: receives requests from Serve's HTTP and gRPC proxies and forwards them to replicas.

It checks API keys and computes routing prefixes. It has no model; several processes may share the
load. Large requests are parsed in a thread, to keep the event loop responsive.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from ...proto import octavo_pb2 as pb
from ..errors import RequestError
from ..observability.rejection_log import API_KEY, RejectionLog
from ..server.api_keys import read_keys
from ..server.drain import CallTracker
from ..server.errors import RequestRejected
from ..server.grpc_api.status import failure_of
from ..server.http_api.errors import ApiError, error_of
from ..server.http_api.middleware import MAX_BODY_BYTES, AuthMiddleware, read_body
from ..utils.readers import AT_ONCE
from ..utils.readers import read as in_thread
from .calls import Call, GrpcCall, GrpcEnd, HttpCall, HttpStart
from .prefix import Prefix
from .read import grpc_prefix, http_prefix
from .run_grpc import check_key, end_of

log = logging.getLogger("octavo.server")

TRIES = 3  # replicas to try before one has started to respond
LOST = RequestError("UNAVAILABLE", "the replica was lost; retry")
ONE_SERVER = "is not supported with replicas. "
UNSUPPORTED = {
    "Abort": RequestError("UNIMPLEMENTED", f"Abort {ONE_SERVER}Cancel the call instead"),
    "GetLoad": RequestError(
        "UNIMPLEMENTED", f"GetLoad {ONE_SERVER}Use Ray's dashboard and metrics"
    ),
    "Drain": RequestError(
        "UNIMPLEMENTED", f"Drain {ONE_SERVER}Ray Serve drains replicas that it stops"
    ),
}


@serve.ingress()
class Ingress:
    """The ingress deployment. Serve's gRPC proxy calls the methods named as in `octavo.v1`."""

    def __init__(self, replicas: DeploymentHandle, api_key_file: Path | None) -> None:
        """Create the ingress. Raises `ConfigError` for an invalid key file."""
        self._replicas = replicas.options(stream=True)
        self._keys, self._rejections = read_keys(api_key_file), RejectionLog(None)
        self._middleware = AuthMiddleware(self._http, CallTracker(), self._keys, self._rejections)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Starlette(routes=[Mount("/", app=self._check_and_forward)])

    async def _check_and_forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject requests that need no replica, and forward the others."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        await self._middleware({**scope, "path": path, "root_path": ""}, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False
        try:
            call = await _http_call(scope, receive)
            if call is None:  # the client has disconnected
                return
            async with contextlib.aclosing(self._answers("http", call)) as answers:
                async for message in answers:
                    has_started = True
                    await send(_asgi(message))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ApiError, RequestRejected) as error:
            failure = error_of(error)
            if not has_started:
                await failure.response()(scope, receive, send)
                return
            event = b"data: " + failure.body.encode() + b"\n\n"  # as in openai_stream
            await send({"type": "http.response.body", "body": event, "more_body": False})

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateDelta]:
        """Stream a request's deltas.

        Serve's proxy needs a message to send a status, so a rejected request gets one delta with
        its `failure`.
        """
        name = request.request_id
        try:
            call = await self._grpc_call("Inference", "Generate", request, grpc_context)
            name = call.request_id
            delta = pb.GenerateDelta(request_id=name)
            async with contextlib.aclosing(self._answers("grpc", call)) as answers:
                async for message in answers:
                    if isinstance(message, GrpcEnd):
                        if delta.HasField("failure"):  # the last delta has the error already
                            return
                        _set(grpc_context, message)
                        delta = pb.GenerateDelta(request_id=name)
                        delta.failure.CopyFrom(failure_of(RequestError(message.code, message.text)))
                        yield delta
                        return
                    delta = pb.GenerateDelta.FromString(message)
                    if delta.HasField("failure"):
                        failed = delta.failure
                        _set(grpc_context, end_of(RequestError(failed.code, failed.text)))
                    yield delta
        except RequestRejected as error:
            _set(grpc_context, end_of(error.reason))
            yield pb.GenerateDelta(request_id=name, failure=failure_of(error.reason))

    async def GenerateOnce(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.GenerateReply:
        return await self._once(
            "Inference", "GenerateOnce", request, grpc_context, pb.GenerateReply
        )

    async def Tokenize(
        self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext
    ) -> pb.TokenizeReply:
        return await self._once("Inference", "Tokenize", request, grpc_context, pb.TokenizeReply)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, grpc_context: RayServegRPCContext
    ) -> pb.DetokenizeReply:
        return await self._once(
            "Inference", "Detokenize", request, grpc_context, pb.DetokenizeReply
        )

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.ModelInfo:
        return await self._once("Control", "GetModelInfo", request, grpc_context, pb.ModelInfo)

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.ServerInfo:
        """Return the information of one replica."""
        return await self._once("Control", "GetServerInfo", request, grpc_context, pb.ServerInfo)

    async def Abort(
        self, request: pb.AbortRequest, grpc_context: RayServegRPCContext
    ) -> pb.AbortReply:
        _set(grpc_context, end_of(UNSUPPORTED["Abort"]))
        return pb.AbortReply()

    async def GetLoad(
        self, request: pb.GetLoadRequest, grpc_context: RayServegRPCContext
    ) -> pb.Load:
        _set(grpc_context, end_of(UNSUPPORTED["GetLoad"]))
        return pb.Load()

    async def Drain(
        self, request: pb.DrainRequest, grpc_context: RayServegRPCContext
    ) -> pb.DrainReply:
        _set(grpc_context, end_of(UNSUPPORTED["Drain"]))
        return pb.DrainReply()

    async def _once(
        self, service: str, method: str, request: Message, context: RayServegRPCContext, reply: Any
    ) -> Any:
        """Return the reply; an empty one with a status that is not OK."""
        found = reply()
        try:
            call = await self._grpc_call(service, method, request, context)
            async with contextlib.aclosing(self._answers("grpc", call)) as answers:
                async for message in answers:
                    if isinstance(message, GrpcEnd):
                        _set(context, message)
                    else:
                        found = reply.FromString(message)
        except RequestRejected as error:
            _set(context, end_of(error.reason))
        return found

    async def _grpc_call(
        self, service: str, method: str, request: Message, context: RayServegRPCContext
    ) -> GrpcCall:
        """Check the API key and the size of a request, and build the call.

        The limit is that of `octavo serve`, because Ray's own is 2 GiB. Raises `RequestRejected`.
        """
        metadata = dict(context.invocation_metadata())
        try:
            check_key(metadata, self._keys)
        except RequestRejected:
            self._rejections.add(API_KEY, context.peer())
            raise
        if (size := request.ByteSize()) > MAX_BODY_BYTES:
            text = f"the message has {size} bytes, over {MAX_BODY_BYTES}; send smaller media"
            raise RequestRejected("RESOURCE_EXHAUSTED", text)
        make = functools.partial(_grpc_call, service, method, request, metadata, context.peer())
        return await in_thread(make, size > AT_ONCE)

    async def _answers(self, method: str, call: Call) -> AsyncGenerator[Any, None]:
        """Yield a replica's response messages. Raises `RequestRejected`.

        If a replica is lost or unavailable before it has started to respond, try another one,
        chosen by load only.
        """
        for left in reversed(range(TRIES)):
            stream = getattr(self._replicas, method).remote(call)
            has_started = False
            try:
                async for message in stream:
                    if not has_started and left and _is_unavailable(message):
                        break
                    has_started = True
                    yield message
                else:
                    return
            except (RayError, RayServeException) as error:
                log.warning("request %r: lost its replica: %s", call.request_id, type(error))
                if has_started or not left:
                    raise RequestRejected(LOST.code, LOST.message) from None
            finally:
                stream.cancel()
            call = replace(call, prefix=Prefix())


def _is_unavailable(message: Any) -> bool:
    if isinstance(message, HttpStart):
        return message.status == 503
    return isinstance(message, GrpcEnd) and message.code == "UNAVAILABLE"


async def _http_call(scope: Scope, receive: Receive) -> HttpCall | None:
    """Read the body and build the call; None if the client disconnects. Raises `ApiError`."""
    body = await read_body(receive)
    if body is None:
        return None
    path = scope["path"]
    headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
    given = dict(headers).get(b"x-request-id", b"").decode("latin-1")
    name = given or uuid.uuid4().hex
    if not given:
        headers = (*headers, (b"x-request-id", name.encode()))
    prefix = await http_prefix(path, body)
    query, server = scope.get("query_string", b""), scope.get("server")
    server = tuple(server) if server else None
    return HttpCall(name, prefix, scope["method"], path, query, headers, body, server)


def _asgi(message: HttpStart | bytes) -> dict[str, Any]:
    if isinstance(message, HttpStart):
        headers = list(message.headers)
        return {"type": "http.response.start", "status": message.status, "headers": headers}
    return {"type": "http.response.body", "body": message, "more_body": True}


def _grpc_call(
    service: str, method: str, request: Message, metadata: dict[str, Any], peer: str
) -> GrpcCall:
    name = getattr(request, "request_id", "") or metadata.get("x-request-id", "")
    if not name:
        name = metadata["x-request-id"] = uuid.uuid4().hex
    prefix = grpc_prefix(request) if isinstance(request, pb.GenerateRequest) else Prefix()
    data = request.SerializeToString()
    return GrpcCall(name, prefix, service, method, data, tuple(metadata.items()), peer)


def _set(context: RayServegRPCContext, end: GrpcEnd) -> None:
    context.set_code(grpc.StatusCode[end.code])
    context.set_details(end.text)
    context.set_trailing_metadata(list(end.trailing_metadata))
