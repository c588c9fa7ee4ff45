"""The client's connection and its unary calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ...proto import octavo_pb2 as pb
from ...proto import octavo_pb2_grpc
from ..utils.lifetime import (
    broken_grpc,
    call_in_flight,
    close_at_exit,
    disown_after_fork,
    leak,
    reject_pickling,
)
from .channel import Tls, error_of, key_metadata, open_channel
from .errors import ClientError, invalid


class UnaryClient:
    """The methods of `octavo.Client` that take no prompt. All raise `ClientError`."""

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        tls: Tls | bool = False,
    ) -> None:
        """Create a client, which connects when first used.

        `address`: HOST:PORT. `api_key`: if the server requires one. `tls`: True, or an `octavo.Tls`
        with files.
        """
        if cause := broken_grpc():
            raise ClientError("FAILED_PRECONDITION", cause)
        self.address = address
        self._disowned = ""  # the reason, in a process forked from the one that created it
        self._metadata = key_metadata(api_key)
        self._channel = open_channel(address, tls)
        self._stub = octavo_pb2_grpc.InferenceStub(self._channel)
        self._control = octavo_pb2_grpc.ControlStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        close_at_exit(self)
        disown_after_fork(self)

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids, with or without special tokens."""
        try:
            request = pb.DetokenizeRequest(ids=token_ids, skip_special_tokens=skip_special_tokens)
        except (TypeError, ValueError):
            raise invalid("must be a list of token ids", "token_ids") from None
        return self._call(self._stub.Detokenize, request).text

    def abort(self, request_id: str) -> bool:
        """Abort a request. Return False if the server has no such request."""
        return self._call(self._stub.Abort, pb.AbortRequest(request_id=request_id)).found

    def model_info(self) -> pb.ModelInfo:
        """Return the served model's name, sizes and limits."""
        return self._call(self._control.GetModelInfo, pb.GetModelInfoRequest())

    def server_info(self) -> pb.ServerInfo:
        """Return the server's version, uptime in seconds and settings as JSON values."""
        return self._call(self._control.GetServerInfo, pb.GetServerInfoRequest())

    def load(self) -> pb.Load:
        """Return the engine's current load."""
        return self._call(self._control.GetLoad, pb.GetLoadRequest())

    def drain(self, timeout_s: float | None = None) -> int:
        """Drain the server: reject new requests and wait for running ones.

        Waits at most `timeout_s` seconds and returns how many requests are left. The server process
        keeps running until it is stopped.
        """
        try:
            request = pb.DrainRequest(timeout_s=timeout_s)
        except TypeError:
            raise invalid("must be a number of seconds", "timeout_s") from None
        return self._call(self._control.Drain, request).num_running

    def health(self, service: str = "") -> str:
        """Return SERVING or NOT_SERVING. Needs no API key.

        `service`: empty for the whole server, or a service such as "octavo.v1.Inference".
        """
        request = health_pb2.HealthCheckRequest(service=service)
        status = self._call(self._health.Check, request).status
        return health_pb2.HealthCheckResponse.ServingStatus.Name(status)

    def wait_ready(self, timeout: float) -> None:
        """Wait until the server is reachable. Raises `ClientError` after `timeout` seconds."""
        self._check_owner()
        try:
            with call_in_flight():
                grpc.channel_ready_future(self._channel).result(timeout)
        except grpc.FutureTimeoutError:
            raise ClientError("UNAVAILABLE", f"cannot reach a server at {self.address}") from None

    def _call(self, method: Callable[..., Any], request: Any, timeout: float | None = None) -> Any:
        try:
            with call_in_flight():
                return self._start(method, request, timeout)
        except grpc.RpcError as error:
            raise error_of(error) from None

    def _start(self, method: Callable[..., Any], request: Any, timeout: float | None) -> Any:
        """Start a streaming call, or return a unary call's reply. May raise `grpc.RpcError`."""
        self._check_owner()
        if timeout is not None and not isinstance(timeout, int | float):
            raise invalid(f"timeout={timeout!r}: must be a number of seconds")
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except ValueError:
            raise ClientError("UNAVAILABLE", "this client is closed; create a new one") from None

    def _check_owner(self) -> None:
        if self._disowned:
            raise ClientError(
                "FAILED_PRECONDITION", f"this client cannot be used: {self._disowned}"
            )

    def disown(self, cause: str) -> None:
        """Reject further use. Called in a forked process."""
        self._disowned = cause
        leak(self._channel)

    def close(self) -> None:
        """Close the connection. Safe to call twice, and without effect in a forked process."""
        if not self._disowned:
            self._channel.close()

    def __reduce__(self) -> Any:
        return reject_pickling("octavo.Client")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
