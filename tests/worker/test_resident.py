"""Memory that a worker takes before it serves, not while it does."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from octavo.engine.runner import resident
from octavo.engine.runner.resident import CHUNK_BYTES, chunks, make_resident

SIZE = 3 * CHUNK_BYTES + 5000


def zeros() -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, SIZE), dtype=torch.uint8)


def resident_pages(tensor: torch.Tensor) -> int:
    """Pages of the tensor that are in memory, by mincore(2)."""
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    count = (tensor.data_ptr() + tensor.nbytes - first) // page
    found = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None)
    assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(count * page), found) == 0
    return sum(each & 1 for each in found)


@pytest.mark.lesson("L13")
def test_kv_cache_memory_is_resident_before_it_is_used() -> None:
    cache = zeros()
    cache[CHUNK_BYTES : CHUNK_BYTES + 10] = 7
    before = resident_pages(cache)
    make_resident([cache]).join(60)
    assert before < 0.6 * SIZE / mmap.PAGESIZE  # a huge page or two were touched
    assert resident_pages(cache) >= SIZE // mmap.PAGESIZE - 1
    assert int(cache.sum()) == 70  # the content stays


def test_memory_that_is_short_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "device_memory", lambda device: (10 << 30, 100 << 30))
    cache = zeros()
    make_resident([cache]).join(60)
    assert resident_pages(cache) < 0.6 * SIZE / mmap.PAGESIZE


def test_chunks_are_whole_pages_inside_the_range() -> None:
    page = mmap.PAGESIZE
    found = list(chunks(10 * page + 1, SIZE))
    assert found[0][0] == 11 * page
    assert all(size <= CHUNK_BYTES and at % page == size % page == 0 for at, size in found)
    assert [at + size for at, size in found[:-1]] == [at for at, _ in found[1:]]
    assert found[-1][0] + found[-1][1] <= 10 * page + 1 + SIZE
    assert list(chunks(page + 1, page)) == []
