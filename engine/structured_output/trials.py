"""Compile grammars in a trial process before the engine does.

A grammar that crashes the library, or takes too much time or memory, ends a worker of
`trial_process.py` and not the engine. There are two workers. The quick one gives every grammar a
tenth of a second of CPU time; grammars that need more use the slow one, so that they only delay
each other.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from ...proto import grammar_pb2 as pb
from ..errors import GrammarQueueFull
from ..utils.lifetime import disown_after_fork
from .error_messages import TOO_COMPLEX, TOO_LARGE, TOO_SLOW
from .trial_client import shared_text, start, stop

log = logging.getLogger("octavo.engine")

MAX_GRAMMAR_BYTES = 32 << 20  # maximum size of a compiled grammar
QUICK_SECONDS, SLOW_SECONDS = 0.1, 1.0  # CPU time limit of a trial
SLOW_NICENESS = 10  # lower priority than the engine and its workers
WALL_FACTOR = 20  # wall time limit as a multiple of the CPU time limit, for a busy machine
START_SECONDS = 60.0
MAX_TRIALS = 200  # per worker process, since its heap fragments
PACKET_BYTES = 64 * 1024


class TrialsUnavailable(Exception):
    """The trial process is not running or does not respond."""


class CompileCancelled(Exception):
    """The request ended during the trial of its grammar."""


@dataclass(frozen=True)
class Outcome:
    """Result of a trial."""

    error: str = ""  # why the grammar is rejected
    is_timed_out: bool = False  # The quick worker's time limit was exceeded.
    seconds: float = 0.0  # CPU time to compile and to compute the first mask
    num_bytes: int = 0  # memory of the compiled grammar


class CompileTask:
    """Compilation of one request's grammar, which another thread may cancel."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: TrialWorker | None = None  # busy with this task's grammar
        self.is_cancelled = False

    def cancel(self) -> None:
        with self._lock:
            self.is_cancelled = True
            if self._worker is not None:
                self._worker.interrupt()

    def check(self) -> None:
        """Raise `CompileCancelled` if the task was cancelled."""
        if self.is_cancelled:
            raise CompileCancelled

    @contextmanager
    def using(self, worker: TrialWorker) -> Iterator[None]:
        """Let `cancel` interrupt the worker within this block only."""
        with self._lock:
            self.check()
            self._worker = worker
        try:
            yield
        finally:
            with self._lock:
                self._worker = None


class TrialWorker:
    """A forked process, which ends when `interrupt` or `close` closes its pipe."""

    def __init__(self, channel: socket.socket, pipe: int) -> None:
        self._channel, self._pipe = channel, pipe
        self._lock = threading.Lock()
        self._is_good, self._is_ready = True, False
        self.num_trials = 0
        disown_after_fork(self)

    def disown(self, cause: str) -> None:
        """Close the copies of a forked process: the worker ends once all copies are closed."""
        self._lock = threading.Lock()
        self.close()

    @property
    def is_alive(self) -> bool:
        return self._is_good and self._pipe >= 0

    def await_ready(self) -> bool:
        """Wait for the process to start, and return whether it is running."""
        try:
            if self._is_ready:
                self._channel.settimeout(0)
                self._channel.recv(1, socket.MSG_PEEK)
                return False  # closed: the process never sends unrequested messages
            self._channel.settimeout(START_SECONDS)
            self._is_ready = pb.Ready.FromString(self._channel.recv(PACKET_BYTES)).is_ready
        except BlockingIOError:
            return True
        except (OSError, DecodeError):
            return False
        return self._is_ready

    def run(self, text: str, field: str, cpu_seconds: float) -> pb.Result | None:
        """Return the result of a trial; None if the worker ended without one.

        Raises TimeoutError, after which the worker must be closed.
        """
        self.num_trials += 1
        trial = pb.Trial(field=field, cpu_seconds=cpu_seconds)
        try:
            self._channel.settimeout(cpu_seconds * WALL_FACTOR)
            with shared_text(text) as descriptor:
                socket.send_fds(self._channel, [trial.SerializeToString()], [descriptor])
            data = self._channel.recv(PACKET_BYTES)
            result = pb.Result.FromString(data) if data else None
        except TimeoutError:
            self._is_good = False
            raise
        except (OSError, DecodeError):
            result = None
        self._is_good = result is not None and not result.is_timed_out
        return result

    def interrupt(self) -> None:
        """End the process, so that a thread in `run` returns."""
        with self._lock:
            pipe, self._pipe = self._pipe, -1
        if pipe >= 0:
            os.close(pipe)

    def close(self) -> None:
        self.interrupt()
        self._channel.close()


class TrialServer:
    """The trial process, which holds the tokenizer and forks workers."""

    def __init__(self, tokenizer: str, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        """Start the process, which is ready about a second later. Raises OSError."""
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(START_SECONDS)
        self._is_ready = False
        with theirs:
            self._process = start(theirs.fileno())
        self.close = weakref.finalize(self, stop, self._process, self._channel)
        disown_after_fork(self)
        load = pb.Load(vocab_size=vocab_size, end_token_ids=end_token_ids)
        with shared_text(tokenizer) as descriptor:
            self._send(pb.ServerRequest(load=load), descriptor)

    def disown(self, cause: str) -> None:
        """Close the copies of a forked process, without effect on the parent's."""
        self.close.detach()
        self._channel.close()
        if self._process.stdin is not None:
            self._process.stdin.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, niceness: int) -> TrialWorker:
        """Fork a worker. Raises `TrialsUnavailable`."""
        self._await_ready()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        read, write = os.pipe()
        try:
            self._send(pb.ServerRequest(fork=pb.Fork(niceness=niceness)), theirs.fileno(), read)
        except BaseException:
            ours.close()
            os.close(write)
            raise
        finally:
            theirs.close()
            os.close(read)
        return TrialWorker(ours, write)

    def _await_ready(self) -> None:
        if self._is_ready:
            return
        try:
            ready = pb.Ready.FromString(self._channel.recv(PACKET_BYTES))
        except (OSError, DecodeError) as error:
            raise TrialsUnavailable(f"the trial process did not start: {error}") from None
        if not ready.is_ready:
            reason = ready.error or "the process ended"
            raise TrialsUnavailable(f"the trial process cannot load the tokenizer: {reason}")
        self._is_ready = True

    def _send(self, request: pb.ServerRequest, *descriptors: int) -> None:
        try:
            socket.send_fds(self._channel, [request.SerializeToString()], descriptors)
        except OSError as error:
            raise TrialsUnavailable(f"cannot send to the trial process: {error}") from None


class Trials:
    """The trial server and its two workers. Thread-safe."""

    def __init__(self, tokenizer: str, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        """Start the server without waiting for it."""
        self._given: Any = (tokenizer, vocab_size, end_token_ids)
        self._lock = threading.Lock()  # guards the server
        self._server: TrialServer | None = None
        self._slots = {True: _Slot(), False: _Slot()}  # by `is_quick`
        self._is_closed = False
        self._start()

    @property
    def pid(self) -> int | None:
        """Process id of the server; None if it is not running."""
        return self._server.pid if self._server is not None else None

    def run(self, text: str, field: str, is_quick: bool, task: CompileTask) -> Outcome:
        """Run a trial of a grammar. Raises `TrialsUnavailable` or `CompileCancelled`."""
        slot = self._slots[is_quick]
        with slot.lock:
            result = self._run(slot, text, field, is_quick, task)
            if result is None:  # Retry: the worker may have ended for another reason.
                result = self._run(slot, text, field, is_quick, task)
        return _outcome(result, is_quick)

    def _run(
        self, slot: _Slot, text: str, field: str, is_quick: bool, task: CompileTask
    ) -> pb.Result | None:
        task.check()
        worker = self._take(slot, is_quick)
        try:
            with task.using(worker):
                result = worker.run(text, field, QUICK_SECONDS if is_quick else SLOW_SECONDS)
            task.check()
        except TimeoutError:
            if is_quick:
                return pb.Result(is_timed_out=True)
            text = "structured: the server was too busy to compile the grammar; try again later"
            raise GrammarQueueFull(text) from None
        finally:
            slot.worker = self._kept(worker, is_quick)
            if self._is_closed and slot.worker is not None:
                slot.worker.interrupt()
        return result

    def _take(self, slot: _Slot, is_quick: bool) -> TrialWorker:
        for _ in range(3):
            worker = slot.worker or self._fork(is_quick)
            slot.worker = None
            if worker.await_ready():
                return worker
            worker.close()
        raise TrialsUnavailable("the trial process loses its workers")

    def _kept(self, worker: TrialWorker, is_quick: bool) -> TrialWorker | None:
        """Return `worker` if it can be reused, else a replacement."""
        if worker.is_alive and worker.num_trials < MAX_TRIALS and not self._is_closed:
            return worker
        worker.close()
        try:
            return None if self._is_closed else self._fork(is_quick)
        except TrialsUnavailable:  # The next trial will retry.
            return None

    def _fork(self, is_quick: bool) -> TrialWorker:
        niceness = 0 if is_quick else SLOW_NICENESS
        with self._lock:
            try:
                return self._start().fork(niceness)
            except TrialsUnavailable:
                if self._server is not None:
                    self._server.close()
                    self._server = None
            log.warning("the grammar trial process has ended; restarting it")
            return self._start().fork(niceness)

    def _start(self) -> TrialServer:
        if self._is_closed:
            raise TrialsUnavailable("the trial process is closed")
        try:
            self._server = self._server or TrialServer(*self._given)
        except OSError as error:
            raise TrialsUnavailable(f"cannot start the trial process: {error}") from None
        if self._is_closed:  # `close` may not have found the new server.
            self._server.close()
            raise TrialsUnavailable("the trial process is closed")
        return self._server

    def close(self) -> None:
        """End all processes. A trial in progress fails."""
        self._is_closed = True
        server = self._server
        if server is not None:
            server.close()
        for slot in self._slots.values():
            worker = slot.worker
            if worker is not None:
                worker.interrupt()


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: TrialWorker | None = None


def _outcome(result: pb.Result | None, is_quick: bool) -> Outcome:
    if result is None:  # a crash, or out of memory
        return Outcome(error=TOO_COMPLEX)
    if result.is_timed_out:
        return Outcome(error="" if is_quick else TOO_SLOW, is_timed_out=is_quick)
    error = result.error
    if not error and result.num_bytes > MAX_GRAMMAR_BYTES:
        error = TOO_LARGE
    return Outcome(error, seconds=result.cpu_seconds, num_bytes=result.num_bytes)
