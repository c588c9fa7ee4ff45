"""Connections of one client thread to both servers, and the first answer to each request."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import grpc

from octavo.proto import octavo_pb2_grpc

from .media import MediaSet

TIMEOUT = 120.0  # seconds until a call without an answer counts as failed
MAX_ANSWERS = 2000  # number of first answers kept for comparison


class FirstAnswers:
    """Thread-safe store of the first answer to each request."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, request: str, answer: Any) -> None:
        """Raise AssertionError if the same request was answered differently before."""
        with self._lock:
            first = self._answers.setdefault(request, answer)
            while len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)
        assert answer == first, f"{answer!r} differs from the first answer {first!r}"


@dataclass
class Caller:
    """The clients of one thread."""

    grpc_address: str
    http_address: str
    api_key: str
    media: MediaSet
    answers: FirstAnswers
    rng: random.Random
    _connection: http.client.HTTPConnection | None = None
    _channel: grpc.Channel | None = field(default=None)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}", "content-type": "application/json"}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.api_key}"),)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send one HTTP request, usually over an existing connection."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = self.headers if headers is None else headers
        if self._connection is None or self.rng.random() < 0.3:
            self.close_http()
        is_new = self._connection is None
        try:
            return self._send(method, path, data, sent)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self.close_http()
            if is_new:
                raise
            return self._send(method, path, data, sent)  # the server closed an idle connection

    def _send(
        self, method: str, path: str, data: bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        if self._connection is None:
            host, _, port = self.http_address.rpartition(":")
            self._connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT)
        self._connection.request(method, path, data, headers)
        response = self._connection.getresponse()
        return response.status, response.read()

    def post(self, path: str, body: Any) -> Any:
        """Return the JSON of a request that must succeed."""
        status, data = self.request("POST", path, body)
        assert status == 200, f"{status} {data[:300]!r}"
        return json.loads(data)

    def events(self, path: str, body: Any) -> list[Any]:
        """Return the JSON events of a stream that must succeed."""
        status, data = self.request("POST", path, {**body, "stream": True})
        assert status == 200, f"{status} {data[:300]!r}"
        lines = [each[6:] for each in data.decode().split("\n") if each.startswith("data: ")]
        assert lines[-1] == "[DONE]", lines[-1]
        found = [json.loads(line) for line in lines[:-1]]
        assert not any("error" in event for event in found), found[-1]
        return found

    def open_socket(self) -> socket.socket:
        host, _, port = self.http_address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=TIMEOUT)

    def raw_post(self, path: str, body: bytes, length: int | None = None) -> socket.socket:
        """Send a POST request over a new socket and return it; `length` is the content-length."""
        head = f"POST {path} HTTP/1.1\r\nhost: {self.http_address}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        head += f"content-length: {len(body) if length is None else length}\r\n\r\n"
        opened = self.open_socket()
        opened.sendall(head.encode() + body)
        return opened

    @property
    def channel(self) -> grpc.Channel:
        """A gRPC channel, occasionally replaced by a new one."""
        if self._channel is not None and self.rng.random() < 0.05:
            self._channel.close()
            self._channel = None
        if self._channel is None:
            # Without a local pool, the channel would share a connection with all others.
            options = [("grpc.use_local_subchannel_pool", 1)]
            options += [("grpc.max_receive_message_length", 256 << 20)]
            self._channel = grpc.insecure_channel(self.grpc_address, options)
        return self._channel

    @property
    def inference(self) -> octavo_pb2_grpc.InferenceStub:
        return octavo_pb2_grpc.InferenceStub(self.channel)

    @property
    def control(self) -> octavo_pb2_grpc.ControlStub:
        return octavo_pb2_grpc.ControlStub(self.channel)

    def call(self, method: Callable[..., Any], message: Any) -> Any:
        """Return the reply of a unary call that must succeed."""
        return method(message, timeout=TIMEOUT, metadata=self.metadata)

    def stream(self, message: Any, timeout: float = TIMEOUT) -> Any:
        return self.inference.Generate(message, timeout=timeout, metadata=self.metadata)

    def close_http(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        self.close_http()
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def read_some(opened: socket.socket, num_bytes: int) -> Iterator[bytes]:
    """Yield received data up to `num_bytes` or until the server closes; then close."""
    with closing(opened):
        while num_bytes > 0 and (data := opened.recv(4096)):
            num_bytes -= len(data)
            yield data
