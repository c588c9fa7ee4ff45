"""Starts and stops the process that tries grammars, and passes texts to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..utils.lifetime import start_tied

MODULE = "octavo.engine.structured_output.trial_process"
MEMORY_BYTES = 256 << 20  # that a trial may take
# Its own environment: it needs nothing else of the engine's.
KEPT_ENVIRONMENT = ("PYTHON", "LD_", "LC_", "LANG", "VIRTUAL_ENV")
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # arenas reserve address space, which is limited
    "TOKENIZERS_PARALLELISM": "false",  # threads would make forking unsafe
}


@contextmanager
def shared_text(text: str) -> Iterator[int]:
    """Yield a descriptor of memory that holds the text."""
    descriptor = os.memfd_create("octavo-grammar", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(text.encode("utf-8", "surrogatepass"))
        yield descriptor
    finally:
        os.close(descriptor)


def start(socket_number: int) -> subprocess.Popen[bytes]:
    """`-P`: our own folder names (`kernels`, `proto`) must not shadow a user's packages."""
    env = {name: text for name, text in os.environ.items() if name.startswith(KEPT_ENVIRONMENT)}
    given = ["--socket", str(socket_number), "--memory-bytes", str(MEMORY_BYTES)]
    return start_tied(
        [sys.executable, "-P", "-m", MODULE, *given],
        signal.SIGKILL,
        stdout=subprocess.DEVNULL,
        env={**env, **ENVIRONMENT},
        pass_fds=(socket_number,),
        start_new_session=True,  # Ctrl-C in a terminal reaches the engine alone
    )


def stop(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    process.kill()
    process.wait()
    channel.close()
    if process.stdin:
        process.stdin.close()
