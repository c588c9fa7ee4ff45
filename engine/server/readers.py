"""Read large requests in threads, so that the event loop serves other requests meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

AT_ONCE = 64 << 10  # bytes that are read in the event loop: about 5 ms
MAX_AT_ONCE = 64  # messages, parts, tools and calls that are

# Few: each takes the GIL in turn with the event loop.
_READERS = ThreadPoolExecutor(2, thread_name_prefix="read")
T = TypeVar("T")


async def read(call: Callable[[], T], is_large: bool) -> T:
    """Return what `call` returns, from another thread for a large request."""
    if not is_large:
        return call()
    return await asyncio.get_running_loop().run_in_executor(_READERS, call)
