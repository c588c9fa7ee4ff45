"""The trial process: `python -P -m octavo.engine.structured_output.trial_process`.

Compiling a grammar can overflow the native stack, or take unlimited time and memory. So the engine
only compiles grammars that were compiled here first, under hard limits. The process loads the
tokenizer once and forks workers, which share its memory: replacing one costs milliseconds. It has a
single thread, so that forking is safe. `trials.py` starts it; the protocol is
`proto/grammar.proto`.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import gc
import os
import random
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from ...proto import grammar_pb2 as pb
from .error_messages import TOO_COMPLEX, UNUSABLE, reason_of
from .library import (
    MASK_WORD_BYTES,
    address_space_bytes,
    heap_bytes,
    load_tokenizer,
    mask_words,
    new_matcher,
)

PACKET_BYTES = 64 * 1024
STACK_BYTES = 512 * 1024  # of a trial; less than the engine uses for compiling
WALK_TOKENS = 8  # tokens that a trial generates
POLL_INTERVAL = 0.01  # seconds between checks of a trial's CPU time

_ALLOWED = re.compile(b"[^\0]")  # a byte of a mask with an allowed token


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="octavo.engine.structured_output.trial_process")
    for name in ("socket", "memory-bytes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args(arguments)
    end_with(0)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    channel = socket.socket(fileno=given.socket)
    silence()
    tokenizer = _load(channel)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Workers must not become zombies.
    gc.collect()
    gc.freeze()
    while True:
        request, descriptors = _receive(channel, pb.ServerRequest())
        if os.fork() == 0:
            channel.close()
            os.nice(request.fork.niceness)
            Worker(tokenizer, given.memory_bytes, *descriptors).serve()
        for descriptor in descriptors:
            os.close(descriptor)


def end_with(pipe: int) -> None:
    """Let the kernel kill this process when the pipe's other end closes.

    This also works while the process hangs or is stopped.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def silence() -> None:
    """Discard the output of the library's panics, which quotes the client's grammar."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)


def _load(channel: socket.socket) -> Any:
    request, (descriptor,) = _receive(channel, pb.ServerRequest())
    asked = request.load
    try:
        text = _read_text(descriptor)
        tokenizer = load_tokenizer(text, asked.vocab_size, asked.end_token_ids)
    except Exception as error:
        channel.send(pb.Ready(error=str(error)[:1000] or "unknown").SerializeToString())
        _end()
    channel.send(pb.Ready(is_ready=True).SerializeToString())
    return tokenizer


class Worker:
    """A forked process that runs one trial after another."""

    def __init__(self, tokenizer: Any, memory_bytes: int, channel: int, pipe: int) -> None:
        """Apply the limits. `memory_bytes`: allowed beyond the address space mapped already."""
        end_with(pipe)
        self._tokenizer = tokenizer
        self._channel = socket.socket(fileno=channel)
        most = address_space_bytes() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        threading.stack_size(STACK_BYTES)
        self._mask = bytearray(mask_words(tokenizer) * MASK_WORD_BYTES)
        self._mask_address = ctypes.addressof(ctypes.c_char.from_buffer(self._mask))

    def serve(self) -> NoReturn:
        self._answer(pb.Ready(is_ready=True))
        while True:
            trial, (descriptor,) = _receive(self._channel, pb.Trial())
            self._answer(self._try(trial, _read_text(descriptor)))

    def _try(self, trial: pb.Trial, text: str) -> pb.Result:
        """Compile on another thread while this one checks the CPU time.

        The timer ends the process if the library keeps this thread from running.
        """
        result = pb.Result()
        signal.setitimer(signal.ITIMER_PROF, 2 * trial.cpu_seconds)
        start = time.process_time()
        thread = threading.Thread(target=self._compile, args=(trial.field, text, result))
        thread.start()
        while thread.is_alive():
            thread.join(POLL_INTERVAL)
            if thread.is_alive() and time.process_time() - start > trial.cpu_seconds:
                self._answer(pb.Result(is_timed_out=True))
                _end()
        signal.setitimer(signal.ITIMER_PROF, 0)
        # Not zero: an empty message would look like a closed socket.
        result.cpu_seconds = max(time.process_time() - start, 1e-9)
        return result

    def _compile(self, field: str, text: str, result: pb.Result) -> None:
        before = heap_bytes()
        try:
            matcher = new_matcher(self._tokenizer, text)
            if not matcher.is_error():
                matcher.unsafe_compute_mask_ptr(self._mask_address, len(self._mask))
            result.num_bytes = max(0, heap_bytes() - before)
            self._walk(matcher)
            if matcher.is_error():
                result.error = reason_of(matcher.get_error(), field)
        except MemoryError:
            result.error = TOO_COMPLEX
        except Exception as error:
            result.error = reason_of(str(error), field)
        except BaseException:  # a panic in the library, which pyo3 derives from BaseException
            result.error = UNUSABLE

    def _walk(self, matcher: Any) -> None:
        """Generate the start of a random answer, to exercise the lexer.

        Errors are ignored here, since they concern this answer and not the grammar.
        """
        state, draw = matcher.deep_copy(), random.Random(0)
        for _ in range(WALK_TOKENS):
            start = draw.randrange(len(self._mask))
            found = _ALLOWED.search(self._mask, start) or _ALLOWED.search(self._mask)
            if state.is_error() or state.is_stopped() or found is None:
                return
            byte = self._mask[found.start()]
            bit = draw.choice([bit for bit in range(8) if byte >> bit & 1])
            state.consume_tokens([8 * found.start() + bit])
            state.unsafe_compute_mask_ptr(self._mask_address, len(self._mask))

    def _answer(self, reply: pb.Ready | pb.Result) -> None:
        try:
            self._channel.send(reply.SerializeToString())
        except OSError:
            _end()


def _receive(channel: socket.socket, message: Any) -> tuple[Any, list[int]]:
    """Return the next message and its descriptors. Exit if the engine has closed the socket."""
    try:
        data, descriptors, *_ = socket.recv_fds(channel, PACKET_BYTES, 2)
    except OSError:
        _end()
    if not descriptors:  # Every valid message has at least one.
        _end()
    message.ParseFromString(data)
    return message, descriptors


def _read_text(descriptor: int) -> str:
    with open(descriptor, encoding="utf-8", errors="surrogatepass") as file:
        file.seek(0)
        return file.read()


def _end() -> NoReturn:
    os._exit(0)


if __name__ == "__main__":
    main()
