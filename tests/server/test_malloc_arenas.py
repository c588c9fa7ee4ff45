"""Servers and workers limit the arenas of glibc's malloc."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, threading
from octavo.engine.utils.malloc_arenas import limit_malloc_arenas
if {limited}:
    limit_malloc_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
barrier = threading.Barrier(16)
def allocate():
    barrier.wait()
    for _ in range(1000):
        libc.malloc(1000)
    barrier.wait()  # all threads live at once
threads = [threading.Thread(target=allocate) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, file)
libc.fflush(file)
"""


def num_arenas(limited: bool, **variables: str) -> int:
    env = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    command = [sys.executable, "-P", "-c", SCRIPT.format(limited=limited)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**env, **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.count("<heap nr=")


@pytest.mark.lesson("L13")
def test_all_threads_share_two_arenas() -> None:
    assert num_arenas(limited=False) > 4
    assert num_arenas(limited=True) <= 2
    assert num_arenas(limited=True, MALLOC_ARENA_MAX="6") > 2
