"""Tie objects to the process that created them: closed when it exits, disowned in its forks.

The interpreter stops daemon threads, gRPC's among them, before it destroys objects. An object that
is closed by its `__del__` then waits for them forever, so objects are closed before, by `atexit`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import os
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

EXIT_TIMEOUT = 5.0  # seconds for threads to end, after what they use was closed

FORKED = (
    "it belongs to process {pid}, of which this process is a fork; create a new one in this "
    "process, or start processes with multiprocessing's 'spawn'"
)
FORKED_DURING_CALLS = (
    "gRPC does not work in this process: it was forked while its parent had calls in flight; fork "
    "earlier, or start processes with multiprocessing's 'spawn'"
)


FORKED_WITHOUT_SUPPORT = (
    "gRPC does not work in this process: its parent had used gRPC with GRPC_ENABLE_FORK_SUPPORT=0; "
    "unset that variable, or start processes with multiprocessing's 'spawn'"
)

Call = TypeVar("Call", bound=Any)  # a grpc.Future


class Closeable(Protocol):
    def close(self) -> None: ...


class Joinable(Protocol):
    def join(self, deadline: float) -> None: ...


class Disownable(Protocol):
    def disown(self, cause: str) -> None:
        """In a forked child: reject further use because of `cause`, and release the child's copies
        of what the parent owns, without effect on the parent."""


_closed_at_exit: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()  # in order
_joined_at_exit: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
_owned: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
_calls: set[object] = set()  # one for each gRPC call in flight; `add` and `discard` are atomic
_install_lock = threading.Lock()
_is_installed = False
_pid = os.getpid()
_supports_forks = True  # gRPC, as it was initialized in this process
_had_calls = False  # at the latest fork, in the parent
_broken_cause = ""  # why gRPC cannot be used in this process


def close_at_exit(thing: Closeable) -> None:
    """Close it when the interpreter exits, before its threads are stopped. Keeps no reference."""
    _install()
    _closed_at_exit[thing] = None


def join_at_exit(threads: Joinable) -> None:
    """Wait for them when the interpreter exits, for a while, once everything is closed. A thread
    that is within native code while the interpreter is destroyed can abort the process."""
    _install()
    _joined_at_exit[threads] = None


def disown_after_fork(thing: Disownable) -> None:
    """Call its `disown` in every forked child. Keeps no reference."""
    _install()
    _owned[thing] = None


@contextlib.contextmanager
def call_in_flight() -> Iterator[None]:
    """Mark the time of a gRPC call: a process that is forked meanwhile cannot use gRPC."""
    token = object()
    _calls.add(token)
    try:
        yield
    finally:
        _calls.discard(token)


def track_call(call: Call) -> Call:
    """Mark the time of a call that has been started, until it is done."""
    _calls.add(call)
    call.add_done_callback(_calls.discard)
    return call


def broken_grpc() -> str:
    """Return why gRPC cannot be used in this process; empty where it can.

    gRPC restarts its threads in a forked child, unless another thread of the parent was within
    gRPC, or its support of forks is off: then the child's calls may hang or abort the process.
    """
    return _broken_cause


def start_tied(command: Sequence[str], end_signal: int, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that gets `end_signal` when this one ends, whatever it does or if it is
    stopped. Its standard input is a pipe that this process keeps open and never writes to.

    `options`: of `subprocess.Popen`.
    """
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(command, stdin=read_end, **options)
    except BaseException:
        os.close(write_end)
        raise
    else:
        with contextlib.suppress(OSError):  # it has ended
            fcntl.fcntl(read_end, fcntl.F_SETOWN, process.pid)
            fcntl.fcntl(read_end, fcntl.F_SETSIG, end_signal)
            fcntl.fcntl(read_end, fcntl.F_SETFL, os.O_RDONLY | os.O_ASYNC)
    finally:
        os.close(read_end)
    process.stdin = os.fdopen(write_end, "wb", buffering=0)
    return process


def leak(channel: Any) -> None:
    """Never destroy a parent's gRPC channel in a forked child: where gRPC does not work, that hangs
    when the interpreter exits."""
    increase = ctypes.pythonapi.Py_IncRef
    increase.argtypes = [ctypes.py_object]
    increase(channel)


def reject_pickling(name: str) -> Any:
    """Raise TypeError: for `__reduce__` of what cannot be sent to another process."""
    raise TypeError(f"{name} cannot be sent to another process; create one in that process")


def _install() -> None:
    """Install the hooks when they are first needed: importing this module has no effect."""
    global _is_installed, _supports_forks
    with _install_lock:
        if not _is_installed:
            _is_installed = True
            # gRPC reads it when it creates its first channel, which happens after this.
            value = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "")
            _supports_forks = value.lower() not in ("0", "false", "f", "no", "n")
            atexit.register(_close_all)
            os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


def _close_all() -> None:
    """Oldest first: an engine's workers end before the threads that wait for them are joined."""
    for thing in list(_closed_at_exit):
        with contextlib.suppress(Exception):  # the interpreter exits all the same
            thing.close()
    deadline = time.monotonic() + EXIT_TIMEOUT
    for threads in list(_joined_at_exit):
        threads.join(deadline)


def _before_fork() -> None:
    global _had_calls
    _had_calls = bool(_calls)


def _after_fork_in_child() -> None:
    global _broken_cause, _pid, _install_lock
    if not _supports_forks:
        _broken_cause = FORKED_WITHOUT_SUPPORT
    elif _had_calls:
        _broken_cause = FORKED_DURING_CALLS
    cause, _pid = FORKED.format(pid=_pid), os.getpid()
    _install_lock = threading.Lock()
    owned = list(_owned)
    _calls.clear()
    for registry in (_closed_at_exit, _joined_at_exit, _owned):
        registry.clear()
    for thing in owned:
        with contextlib.suppress(Exception):
            thing.disown(cause)
