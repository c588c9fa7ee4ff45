"""Rendezvous of ranks on several machines, through a key-value store in the engine.

Torch's collectives exchange addresses through a store. Torch's own TCP store listens on an
unprotected port. This store needs no port: each rank sends its requests over the stream that the
engine has open to it, protected by that stream's TLS.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator

from ....proto import worker_pb2 as pb

ASK_TIMEOUT = 60.0  # seconds to wait for the engine's reply
OPEN_CHECK = 1.0  # seconds between two checks that the stream is open


# A request and the queue for its reply; None: no reply will come.
Question = tuple[pb.StoreRequest, "queue.SimpleQueue[pb.StoreReply | None]"]


class SharedStore:
    """Engine side: the store's values by key. Thread-safe."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def answer(self, request: pb.StoreRequest) -> pb.StoreReply:
        """Execute a request and return the key's value."""
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


class Rendezvous:
    """Worker side: sends the requests of all threads over the engine's latest stream."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending: deque[Question] = deque()
        self._stream = 0  # number of the latest stream

    def ask(self, request: pb.StoreRequest) -> bytes | None:
        """Send a request and return the value, None if the key has none.

        Raises `RuntimeError` if the engine does not answer.
        """
        question: Question = (request, queue.SimpleQueue())
        with self._changed:
            self._pending.append(question)
            self._changed.notify_all()
        try:
            reply = question[1].get(timeout=ASK_TIMEOUT)
        except queue.Empty:
            reply = None
        if reply is None:
            with self._changed, contextlib.suppress(ValueError):
                self._pending.remove(question)
            raise RuntimeError("the engine does not answer during the rendezvous of the ranks")
        return reply.value if reply.HasField("value") else None

    def serve(
        self, replies: Iterator[pb.StoreReply], is_open: Callable[[], bool]
    ) -> Iterator[pb.StoreRequest]:
        """Yield requests and deliver their replies, until the stream closes or a newer one opens.

        A request fails if its stream breaks. It is not sent again, because a repeated `add` would
        count twice.
        """
        with self._changed:
            self._stream += 1
            stream = self._stream
            self._changed.notify_all()
        while (question := self._next(stream, is_open)) is not None:
            reply = None
            try:
                yield question[0]
                reply = next(replies, None)
            finally:
                question[1].put(reply)

    def _next(self, stream: int, is_open: Callable[[], bool]) -> Question | None:
        with self._changed:
            while self._stream == stream and is_open():
                if self._pending:
                    return self._pending.popleft()
                self._changed.wait(OPEN_CHECK)
        return None
