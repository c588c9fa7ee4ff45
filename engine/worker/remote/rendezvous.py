"""How ranks on several machines meet: a store that the engine keeps, asked over its calls.

Torch's collectives begin with an exchange of addresses through a store. Torch's own for several
machines listens on an open port; this one needs none: each rank asks over the call that the engine
has open to it anyway, under that call's TLS.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator

from ....proto import worker_pb2 as pb

ASK_TIMEOUT = 60.0  # seconds for the engine to answer
OPEN_CHECK = 1.0  # seconds between two looks whether the engine is there


# What a rank asks, and where its reply is put; None: there will be none.
Question = tuple[pb.StoreRequest, "queue.SimpleQueue[pb.StoreReply | None]"]


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


class Rendezvous:
    """A worker's end: what any thread asks goes out by the stream that the engine opened last."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._asked: deque[Question] = deque()
        self._stream = 0  # which is the latest

    def ask(self, request: pb.StoreRequest) -> bytes | None:
        """The value. Raises RuntimeError when the engine does not answer."""
        question: Question = (request, queue.SimpleQueue())
        with self._moved:
            self._asked.append(question)
            self._moved.notify_all()
        try:
            reply = question[1].get(timeout=ASK_TIMEOUT)
        except queue.Empty:
            reply = None
        if reply is None:
            with self._moved, contextlib.suppress(ValueError):
                self._asked.remove(question)
            raise RuntimeError("the engine does not answer while the ranks meet")
        return reply.value if reply.HasField("value") else None

    def serve(
        self, replies: Iterator[pb.StoreReply], is_open: Callable[[], bool]
    ) -> Iterator[pb.StoreRequest]:
        """What is asked, each followed by its reply; as long as the stream is open and no later one
        is. What breaks off fails: an `add` that came twice would count twice."""
        with self._moved:
            self._stream += 1
            mine = self._stream
            self._moved.notify_all()
        while (question := self._next(mine, is_open)) is not None:
            reply = None
            try:
                yield question[0]
                reply = next(replies, None)
            finally:
                question[1].put(reply)

    def _next(self, mine: int, is_open: Callable[[], bool]) -> Question | None:
        with self._moved:
            while self._stream == mine and is_open():
                if self._asked:
                    return self._asked.popleft()
                self._moved.wait(OPEN_CHECK)
        return None
