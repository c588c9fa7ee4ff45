"""The CPU's own kernels, in C: where a compiler built them and the processor has AVX512-BF16.

`setup.py` compiles them; without a compiler the package installs all the same, and every operation
has a plain torch path. They work on bfloat16 alone, over the memory of torch's tensors.
"""

from __future__ import annotations

import ctypes
import functools
import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

MOST_HEAD_DIM = 128  # this and the next as in attention.c
TILE_ROWS = 96


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none for this processor.

    They share the threads of torch's OpenMP, which is loaded but not for others to see: two of them
    in a process would fight for the cores.
    """
    here = Path(__file__).parent
    found = [
        path for suffix in EXTENSION_SUFFIXES if (path := here / f"_kernels{suffix}").is_file()
    ]
    openmp = _loaded_openmp()
    if not found or openmp is None:
        return None
    try:
        ctypes.CDLL(openmp, ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(found[0]))
    except OSError:
        return None
    return loaded if loaded.octavo_runs_here() else None


def _loaded_openmp() -> str | None:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return None
    match = re.search(r"/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps)
    return match[0] if match else None


def serves(x: torch.Tensor) -> bool:
    """Whether these kernels are for tensors like x."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and library() is not None


def serves_heads(x: torch.Tensor) -> bool:
    """The same for attention over heads x [..., d]."""
    return serves(x) and x.shape[-1] % 16 == 0 and x.shape[-1] <= MOST_HEAD_DIM


def call(name: str, *arguments: Any) -> None:
    """Runs kernel `name`: tensors go by address, whole numbers as C's long, None as NULL; the
    number of threads is added."""
    kernels = library()
    assert kernels is not None
    kernels[name](*map(_converted, arguments), ctypes.c_int(torch.get_num_threads()))


def _converted(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return None if value is None else ctypes.c_long(value)
