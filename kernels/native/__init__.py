"""The CPU's own kernels, in C: where a compiler built them and the processor has AVX512-BF16.

`setup.py` compiles them; without a compiler the package installs all the same, and every operation
has a plain torch path. They work on bfloat16 alone, over the memory of torch's tensors.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

log = logging.getLogger("octavo.kernels")

MAX_HEAD_DIM = 128  # this and the next as in attention.c and decode.c
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
    if any(source.stat().st_mtime > found[0].stat().st_mtime for source in here.glob("*.[ch]")):
        log.warning("the CPU kernels are older than their sources: run `pip install -e .` again")
        return None  # their arguments may be others
    try:
        ctypes.CDLL(openmp, ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(found[0]))
    except OSError:
        return None
    if not loaded.octavo_runs_here():
        return None
    _declare(loaded)
    return loaded


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


@functools.cache
def has_amx() -> bool:
    """Whether this process multiplies tiles: torch's products are then the faster ones. A kernel
    before Linux 5.16 refuses, whatever the processor has."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


@functools.cache
def has_tiles() -> bool:
    """Whether attention multiplies tiles, as it does once this was asked: there is AMX, and it
    computes what it should."""
    kernels = library()
    if kernels is None or not has_amx():
        return False
    found = int(kernels.octavo_check_amx())
    if found < 1:
        why = "failed their check" if found < 0 else "could not be checked"
        log.warning("products by AMX %s: attention over pictures stays torch's", why)
    return found > 0


def instructions() -> str:
    """What the kernels multiply with, for people."""
    if library() is None:
        return "no compiled kernels"
    return "AMX" if has_amx() else "AVX512-BF16"


def attends_frames() -> bool:
    """Whether the attention of pictures is for these kernels: where torch has tiles, so must we."""
    return not has_amx() or has_tiles()


def serves_heads(x: torch.Tensor) -> bool:
    """The same for attention over heads x [..., d]."""
    return serves(x) and x.shape[-1] % 16 == 0 and x.shape[-1] <= MAX_HEAD_DIM


# What the kernels take: an address (p: a tensor, or None), a whole number (l), a float (f); and
# last, all of them, the number of threads.
SIGNATURES = {
    "octavo_paged_attention": "pppppl" + "pl" + "llll" + "f",
    "octavo_decode_attention": "pppppl" + "pl" + "llll" + "fpp",
    "octavo_join_parts": "pppp" + "lll",
    "octavo_vision_attention": "pppl" + "pp" + "lll" + "f",
    "octavo_linear": "pppp" + "lll",
    "octavo_linear_int8": "pppppp" + "pp" + "lll",
    "octavo_pack_panels": "pp" + "ll",
    "octavo_quantize_rows": "ppp" + "ll",
    "octavo_rms_norm": "ppppp" + "ll" + "f",
    "octavo_swiglu": "pp" + "ll",
    "octavo_quick_gelu": "p" + "l",
    "octavo_rotate": "pl" + "pp" + "lll",
    "octavo_mrope_write_kv": "plppl" + "pppppp" + "lllll",
    "octavo_decoder_layers": "plp",
    "octavo_meet": "plll",
}
TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float}


def _declare(kernels: ctypes.CDLL) -> None:
    """ctypes then checks and converts by itself, in a tenth of the time."""
    for name, letters in SIGNATURES.items():
        kernel = getattr(kernels, name)
        kernel.argtypes = [*(TYPES[letter] for letter in letters), ctypes.c_int]
        kernel.restype = None


def call(name: str, *arguments: torch.Tensor | int | float | None) -> None:
    """Runs kernel `name` on torch's threads; tensors go by address. Raises TypeError for arguments
    that are not as in SIGNATURES."""
    given = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
    getattr(library(), name)(*given, torch.get_num_threads())
