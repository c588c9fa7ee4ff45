"""Memory and CPU time of a process and its descendants, from /proc."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds


def tree(pid: int) -> list[int]:
    """Return the pids of the process and its descendants."""
    found = [pid]
    for parent in found:  # the list grows during iteration
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of the whole tree; cheap to read."""
    return sum(_bytes(f"/proc/{each}/status", "RssAnon:") for each in tree(pid))


def shared_bytes(pid: int) -> int:
    """Return the shared memory of the whole tree, counting each page once.

    Walks page tables, so do not call it while measuring.
    """
    return sum(_bytes(f"/proc/{each}/smaps_rollup", "Pss_Shmem:") for each in tree(pid))


def cpu_seconds(pid: int) -> float:
    """Return the CPU time used by the tree."""
    total = 0.0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            after_name = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            total += TICK * (int(after_name[11]) + int(after_name[12]))
    return total


def _bytes(path: str, name: str) -> int:
    """Return the value of a line such as "RssAnon:  123 kB"; 0 if the process is gone."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return 0


class Peak:
    """Peak memory in bytes, updated while `watch` runs."""

    anonymous = 0


@contextlib.contextmanager
def watch(pid: int, every: float = 0.2) -> Iterator[Peak]:
    """Sample the tree's anonymous memory every `every` seconds."""
    peak, over = Peak(), threading.Event()

    def look() -> None:
        while not over.wait(every):
            peak.anonymous = max(peak.anonymous, anonymous_bytes(pid))

    thread = threading.Thread(target=look, name="memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak.anonymous = max(peak.anonymous, anonymous_bytes(pid))


def wait_quiet(pid: int, longest: float = 10.0, share: float = 0.02, window: float = 0.3) -> float:
    """Wait until the tree uses less than `share` of a core, for at most `longest` seconds.

    Returns its last share. Needed since vLLM's worker polls for a second after a step.
    """
    deadline = time.monotonic() + longest
    while True:
        before = cpu_seconds(pid)
        time.sleep(window)
        used = (cpu_seconds(pid) - before) / window
        if used < share or time.monotonic() > deadline:
            return used
