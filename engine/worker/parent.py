"""End a worker when its parent exits, which closes the worker's standard input."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable


def end_with_parent(clean_up: Callable[[], None] = lambda: None) -> None:
    """Exit when standard input closes; it is a pipe that the parent never writes to.

    The kernel sends SIGCONT at that moment, so that a stopped process (SIGSTOP) exits too.
    """
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGCONT)
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)

    def wait() -> None:
        sys.stdin.buffer.read()
        clean_up()
        os._exit(0)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()
