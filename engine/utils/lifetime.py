"""Tie objects to the process that created them: close them at exit, disown them in forks.

The interpreter stops daemon threads, including gRPC's, before it destroys objects. An object closed
by its `__del__` would then wait for them forever, so objects are closed earlier, by `atexit`.
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

EXIT_TIMEOUT = 5.0  # seconds to wait for threads after all objects were closed

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
        """Reject further use in a forked child, with `cause` as the reason.

        Release the child's copies of the parent's resources without effect on the parent.
        """


_closed_at_exit: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()  # oldest first
_joined_at_exit: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
_owned: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
_calls: set[object] = set()  # gRPC calls in flight; `add` and `discard` are atomic
_install_lock = threading.Lock()
_is_installed = False
_pid = os.getpid()
_supports_forks = True  # gRPC's fork support as initialized in this process
_had_calls = False  # whether the parent had calls in flight at the latest fork
_broken_cause = ""  # why gRPC cannot be used in this process


def close_at_exit(thing: Closeable) -> None:
    """Close an object at interpreter exit, before threads are stopped. Keeps a weak reference."""
    _install()
    _closed_at_exit[thing] = None


def join_at_exit(threads: Joinable) -> None:
    """Join threads at interpreter exit, after all objects were closed, for at most EXIT_TIMEOUT.

    A thread in native code can abort the process while the interpreter is destroyed.
    """
    _install()
    _joined_at_exit[threads] = None


def disown_after_fork(thing: Disownable) -> None:
    """Call the object's `disown` in every forked child. Keeps a weak reference."""
    _install()
    _owned[thing] = None


@contextlib.contextmanager
def call_in_flight() -> Iterator[None]:
    """Mark a gRPC call as in flight; a process forked meanwhile cannot use gRPC."""
    token = object()
    _calls.add(token)
    try:
        yield
    finally:
        _calls.discard(token)


def track_call(call: Call) -> Call:
    """Mark a started call as in flight until it is done."""
    _calls.add(call)
    call.add_done_callback(_calls.discard)
    return call


def broken_grpc() -> str:
    """Return why gRPC cannot be used in this process; "" if it can.

    gRPC restarts its threads in a forked child, unless another thread of the parent was inside
    gRPC or its fork support is disabled: then the child's calls may hang or abort the process.
    """
    return _broken_cause


def start_tied(command: Sequence[str], end_signal: int, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that gets `end_signal` when this one ends, even if it hangs or is stopped.

    Its standard input is a pipe that this process keeps open and never writes to. `options` are
    passed to `subprocess.Popen`.
    """
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(command, stdin=read_end, **options)
    except BaseException:
        os.close(write_end)
        raise
    else:
        with contextlib.suppress(OSError):  # the process has already ended
            fcntl.fcntl(read_end, fcntl.F_SETOWN, process.pid)
            fcntl.fcntl(read_end, fcntl.F_SETSIG, end_signal)
            fcntl.fcntl(read_end, fcntl.F_SETFL, os.O_RDONLY | os.O_ASYNC)
    finally:
        os.close(read_end)
    process.stdin = os.fdopen(write_end, "wb", buffering=0)
    return process


def leak(channel: Any) -> None:
    """Never destroy a parent's gRPC channel in a forked child.

    If gRPC does not work there, destroying it would hang at interpreter exit.
    """
    increase = ctypes.pythonapi.Py_IncRef
    increase.argtypes = [ctypes.py_object]
    increase(channel)


def reject_pickling(name: str) -> Any:
    """Raise TypeError. For `__reduce__` of objects that cannot be sent to another process."""
    raise TypeError(f"{name} cannot be sent to another process; create one in that process")


def _install() -> None:
    """Install the hooks on first use, so that importing this module has no side effects."""
    global _is_installed, _supports_forks
    with _install_lock:
        if not _is_installed:
            _is_installed = True
            # gRPC reads the variable when it creates its first channel, which happens later.
            value = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "")
            _supports_forks = value.lower() not in ("0", "false", "f", "no", "n")
            atexit.register(_close_all)
            os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


def _close_all() -> None:
    """Close objects, oldest first, then join threads, which may wait for the closed workers."""
    for thing in list(_closed_at_exit):
        with contextlib.suppress(Exception):  # must not prevent the exit
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
