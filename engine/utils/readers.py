"""Parse large requests in threads, so that the event loop stays responsive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

AT_ONCE = 64 << 10  # bytes; smaller requests are parsed in the event loop, in up to about 5 ms
MAX_AT_ONCE = 64  # messages, parts, tools and calls; the same limit by count

# Few threads, because each competes with the event loop for the GIL.
_READERS = ThreadPoolExecutor(2, thread_name_prefix="read")
T = TypeVar("T")


async def read(call: Callable[[], T], is_large: bool) -> T:
    """Return the result of `call`, run in another thread for a large request."""
    if not is_large:
        return call()
    return await asyncio.get_running_loop().run_in_executor(_READERS, call)
