"""A client process of `octavo bench streams` that reads many streams of one server.

`python -P -m octavo.benchmarks.streams.client KIND ADDRESS FIRST COUNT` opens the streams, prints a
line once all have started, reads until a line arrives on stdin, and prints as JSON, for each
stream, the [time, text] pairs it received. Received data is only timestamped and stored, and parsed
at the end, to keep the overhead of the reader low.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from dataclasses import dataclass, field

import grpc

from octavo.proto import octavo_pb2 as pb

PROMPT = 64  # tokens
MOST = 8000  # output tokens per stream; more than are read
PATH = "/octavo.v1.Inference/Generate"

Pieces = list[tuple[float, bytes]]
Texts = list[tuple[float, str]]


@dataclass(eq=False)
class Stream:
    """Received data of one stream."""

    index: int
    pieces: Pieces = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def prompt(self) -> list[int]:
        return [self.index % 200] * PROMPT

    def add(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))
        if len(self.pieces) == 3:  # the HTTP header counts as one
            self.started.set()


async def _read_grpc(channel: grpc.aio.Channel, stream: Stream) -> None:
    sampling = pb.SamplingParams(temperature=0, max_tokens=MOST, ignore_eos=True)
    asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=stream.prompt), sampling=sampling)
    async for data in channel.unary_stream(PATH)(asked.SerializeToString()):
        stream.add(data)


def _texts_of_grpc(pieces: Pieces) -> Texts:
    return [(at, pb.GenerateDelta.FromString(data).text) for at, data in pieces]


class _HttpReader(asyncio.Protocol):
    """Sends a request and stores received data until the server closes."""

    def __init__(self, request: bytes, stream: Stream) -> None:
        self._request, self._stream = request, stream
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._stream.add(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set()


async def _read_http(address: str, stream: Stream) -> None:
    body = {"prompt": stream.prompt, "max_tokens": MOST, "temperature": 0, "ignore_eos": True}
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    reader = _HttpReader(head.encode() + data, stream)
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(lambda: reader, host, int(port))
    try:
        await reader.closed.wait()
    finally:
        transport.close()


def _texts_of_http(pieces: Pieces) -> Texts:
    """Return the texts of events, with the time at which each event was complete.

    Raises ValueError if the response is not an event stream.
    """
    texts: Texts = []
    rest = b""
    for at, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                raise ValueError(f"the server answered {line.decode()}")
            if line.startswith(b"data: {"):
                texts += [(at, each["text"]) for each in json.loads(line[6:])["choices"]]
    return texts


async def _read_all(kind: str, address: str, first: int, count: int) -> list[Texts]:
    """Read all streams until a line arrives on stdin. Raises RuntimeError if one ends first."""
    streams = [Stream(index) for index in range(first, first + count)]
    async with contextlib.AsyncExitStack() as stack:
        if kind == "http":
            coroutines = [_read_http(address, stream) for stream in streams]
        else:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            coroutines = [_read_grpc(channel, stream) for stream in streams]
        readers = [asyncio.create_task(each) for each in coroutines]
        watching = asyncio.create_task(_until_stopped(streams))
        await asyncio.wait([watching, *readers], return_when=asyncio.FIRST_COMPLETED)
        if not watching.done():
            raise RuntimeError("a stream ended before it was stopped")
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
    texts_of = _texts_of_http if kind == "http" else _texts_of_grpc
    return [texts_of(stream.pieces) for stream in streams]


async def _until_stopped(streams: list[Stream]) -> None:
    for stream in streams:
        await stream.started.wait()
    print("started", flush=True)
    await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    kind, address, *numbers = sys.argv[1:]
    print(json.dumps(asyncio.run(_read_all(kind, address, *map(int, numbers)))))
