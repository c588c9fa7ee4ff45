"""Freed memory that glibc keeps for reuse goes back to the operating system."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import time
from octavo.engine.utils.memory_trim import start_trimming
def resident():  # MB
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20
kept = [bytes(12_000) for _ in range(10_000)]
full = resident()
del kept[::2]  # the other half keeps the heap from shrinking
after = resident()
assert start_trimming(0.1)
end = time.monotonic() + 20
while resident() > full - 30 and time.monotonic() < end:
    time.sleep(0.05)
print(full - after, full - resident())
"""


@pytest.mark.lesson("L13")
def test_scattered_free_memory_is_returned() -> None:
    command = [sys.executable, "-P", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    by_freeing, by_trimming = map(int, done.stdout.split())
    assert by_freeing < 10 and by_trimming >= 30
