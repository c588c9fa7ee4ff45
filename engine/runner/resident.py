"""Make allocated memory resident in the background, so that a worker's RSS does not grow later.

The kernel allocates a page at its first use, and new prompts use unused KV blocks first. Without
this, a worker would grow for hours, and run out of memory late.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import time
from collections.abc import Iterator, Sequence

import torch

from .kv_cache import device_memory

log = logging.getLogger("octavo.worker")

MADV_POPULATE_WRITE = 23  # since Linux 5.14; keeps the content
CHUNK_BYTES = 4 << 20
PAUSE = 0.02  # seconds between chunks, which leaves the cores to the first requests
MIN_FREE_SHARE = 0.1  # of the machine's memory; stop below it


def make_resident(tensors: Sequence[torch.Tensor]) -> threading.Thread:
    """Start a thread that makes the memory of `tensors` on a CPU resident."""
    on_cpu = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    thread = threading.Thread(target=_populate, args=(on_cpu,), name="resident", daemon=True)
    thread.start()
    return thread


def _populate(tensors: Sequence[torch.Tensor]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        for address, size in chunks(tensor.data_ptr(), tensor.nbytes):
            free, total = device_memory(tensor.device)
            if free - size < MIN_FREE_SHARE * total:
                log.warning("memory is low: the rest of the KV cache becomes resident on first use")
                return
            if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_POPULATE_WRITE):
                log.info(
                    "the KV cache becomes resident on first use: madvise failed with errno %d",
                    ctypes.get_errno(),
                )
                return  # the kernel is older than Linux 5.14
            time.sleep(PAUSE)


def chunks(address: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of the whole pages in a range, CHUNK_BYTES at most at a time."""
    page = mmap.PAGESIZE
    first, end = -(-address // page) * page, (address + size) // page * page
    for at in range(first, end, CHUNK_BYTES):
        yield at, min(CHUNK_BYTES, end - at)
