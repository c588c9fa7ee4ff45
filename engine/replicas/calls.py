"""What goes from the ingress to a replica and back: bytes as clients and the doors wrote them, so
that neither side needs the other's libraries."""

from __future__ import annotations

from dataclasses import dataclass

from .prefix import Prefix

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Call:
    """A request of a client's. One of the two kinds below."""

    request_id: str
    prefix: Prefix


@dataclass(frozen=True)
class HttpCall(Call):
    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    server: tuple[str, int | None] | None  # the address that the client reached, as ASGI has it


@dataclass(frozen=True)
class GrpcCall(Call):
    service: str  # "Inference" or "Control"
    method: str
    message: bytes  # as protobuf
    metadata: tuple[tuple[str, str | bytes], ...]
    peer: str


@dataclass(frozen=True)
class HttpStart:
    """The first answer to an `HttpCall`; the body's pieces follow, as bytes."""

    status: int
    headers: Headers


@dataclass(frozen=True)
class GrpcEnd:
    """The last answer to a `GrpcCall` that failed; messages come before it, as bytes."""

    code: str  # of grpc.StatusCode
    text: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]
