"""Start and stop the trial process, and pass texts to it."""

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
MEMORY_BYTES = 256 << 20  # memory limit of a trial
# Environment variables that the process inherits.
KEPT_ENVIRONMENT = ("PYTHON", "LD_", "LC_", "LANG", "VIRTUAL_ENV")
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # Arenas reserve address space, which is limited.
    "TOKENIZERS_PARALLELISM": "false",  # Threads would make forking unsafe.
}


@contextmanager
def shared_text(text: str) -> Iterator[int]:
    """Yield a file descriptor of shared memory that contains the text."""
    descriptor = os.memfd_create("octavo-grammar", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(text.encode("utf-8", "surrogatepass"))
        yield descriptor
    finally:
        os.close(descriptor)


def start(socket_number: int) -> subprocess.Popen[bytes]:
    """Start the trial process, which receives on a socket.

    `-P` keeps the folder names of this package from shadowing other packages.
    """
    env = {name: text for name, text in os.environ.items() if name.startswith(KEPT_ENVIRONMENT)}
    given = ["--socket", str(socket_number), "--memory-bytes", str(MEMORY_BYTES)]
    return start_tied(
        [sys.executable, "-P", "-m", MODULE, *given],
        signal.SIGKILL,
        stdout=subprocess.DEVNULL,
        env={**env, **ENVIRONMENT},
        pass_fds=(socket_number,),
        start_new_session=True,  # Ctrl-C in a terminal must only reach the engine.
    )


def stop(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    process.kill()
    process.wait()
    channel.close()
    if process.stdin:
        process.stdin.close()
