"""How ranks on several machines meet: a store that the engine keeps, asked over its calls.

Torch's collectives begin with an exchange of addresses through a store. Torch's own for several
machines listens on an open port; this one needs none: each rank asks over the call that the engine
has open to it anyway, under that call's TLS.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from ...proto import worker_pb2 as pb

ASK_TIMEOUT = 60.0  # seconds for the engine to answer
OPEN_CHECK = 1.0  # seconds between two looks whether the engine is there


class SharedStore:
    """The engine's end: the values by key. Thread-safe."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def answer(self, request: pb.StoreRequest) -> pb.StoreReply:
        with self._lock:
            return pb.StoreReply(value=self._answer(request))

    def _answer(self, request: pb.StoreRequest) -> bytes | None:
        key, values = request.key, self._values
        match request.WhichOneof("action"):
            case "set":
                values[key] = request.set
            case "add":
                values[key] = b"%d" % (int(values.get(key, b"0")) + request.add)
            case "swap":
                if values.get(key, b"") == request.swap.expected:
                    values[key] = request.swap.desired
            case "delete":
                return values.pop(key, None)
        return values.get(key)


class Meeting:
    """A worker's end: asks on any thread go out one after the other, by the stream that is open."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._asked: queue.SimpleQueue[pb.StoreRequest] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[pb.StoreReply | None] = queue.SimpleQueue()

    def ask(self, request: pb.StoreRequest) -> bytes | None:
        """The value. Raises RuntimeError when the engine does not answer."""
        with self._one_at_a_time:
            self._asked.put(request)
            try:
                reply = self._answered.get(timeout=ASK_TIMEOUT)
            except queue.Empty:
                reply = None
        if reply is None:
            raise RuntimeError("the engine does not answer while the ranks meet")
        return reply.value if reply.HasField("value") else None

    def serve(
        self, replies: Iterator[pb.StoreReply], is_open: Callable[[], bool]
    ) -> Iterator[pb.StoreRequest]:
        """What is asked, as long as the stream is open; each is followed by its reply."""
        while is_open():
            try:
                request = self._asked.get(timeout=OPEN_CHECK)
            except queue.Empty:
                continue
            yield request
            self._answered.put(next(replies, None))
