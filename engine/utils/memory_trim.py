"""Return freed memory to the operating system at intervals.

glibc keeps freed memory in its arenas for reuse. In a server whose threads allocate buffers of all
sizes, the free parts become scattered, so resident memory grows for hours while the memory in use
stays constant. `malloc_trim` returns the free pages of all arenas.
"""

from __future__ import annotations

import ctypes
import threading
import time

INTERVAL = 60.0  # seconds


def start_trimming(interval: float = INTERVAL) -> bool:
    """Trim in a daemon thread. Return False where the C library has no `malloc_trim` (musl)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False

    def run() -> None:
        while True:
            time.sleep(interval)
            trim(0)  # without the GIL

    threading.Thread(target=run, name="memory-trim", daemon=True).start()
    return True
