"""gRPC's health service.

Clients need no key, so calls are limited in size and number and do not block each other. The
library's own servicer holds a lock while a client reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from ....scheduler.params import truncated_repr
from ..errors import RequestRejected

MAX_NAME = 256  # characters of a service's name
MAX_WATCHES = 1024  # concurrent calls


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Health statuses by service name. Not thread-safe: used by one event loop."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()  # replaced at each change
        self._num_watches = 0

    def set(self, service: str, status: int) -> None:
        self._statuses[service] = status
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        if request.service not in self._statuses:
            text = f"service={truncated_repr(request.service)}: unknown; List returns all services"
            raise RequestRejected("NOT_FOUND", text, "service")
        return self._response(request.service)

    async def List(
        self, request: pb.HealthListRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthListResponse:
        return pb.HealthListResponse(
            statuses={service: self._response(service) for service in self._statuses}
        )

    async def Watch(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        if len(request.service) > MAX_NAME:
            raise RequestRejected(
                "INVALID_ARGUMENT", f"service: is over {MAX_NAME} characters long", "service"
            )
        if self._num_watches >= MAX_WATCHES:
            text = f"{MAX_WATCHES} Watch calls are running already, the maximum; use Check"
            raise RequestRejected("RESOURCE_EXHAUSTED", text)
        self._num_watches += 1
        try:
            sent: int | None = None
            while True:
                changed, response = self._changed, self._response(request.service)
                if response.status != sent:
                    sent = response.status
                    yield response
                await changed.wait()
        finally:
            self._num_watches -= 1

    def _response(self, service: str) -> pb.HealthCheckResponse:
        unknown = pb.HealthCheckResponse.SERVICE_UNKNOWN
        return pb.HealthCheckResponse(status=self._statuses.get(service, unknown))
