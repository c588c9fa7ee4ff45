"""Messages between the ingress and replicas.

They contain the encoded requests and responses, so that neither side needs the other's libraries.
"""

from __future__ import annotations

from dataclasses import dataclass

from .prefix import Prefix

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Call:
    """A client's request: an `HttpCall` or a `GrpcCall`."""

    request_id: str
    prefix: Prefix


@dataclass(frozen=True)
class HttpCall(Call):
    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    server: tuple[str, int | None] | None  # the server's address, as in an ASGI scope


@dataclass(frozen=True)
class GrpcCall(Call):
    service: str  # "Inference" or "Control"
    method: str
    message: bytes  # encoded protobuf
    metadata: tuple[tuple[str, str | bytes], ...]
    peer: str


@dataclass(frozen=True)
class HttpStart:
    """First message of the response to an `HttpCall`; parts of the body follow, as bytes."""

    status: int
    headers: Headers


@dataclass(frozen=True)
class GrpcEnd:
    """Last message of the response to a failed `GrpcCall`, after response messages as bytes."""

    code: str  # of grpc.StatusCode
    text: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]
