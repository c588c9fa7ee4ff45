"""Compiled CPU kernels in C, for CPUs with AVX512-BF16.

`setup.py` compiles them. Without a compiler the package installs without them, and every operation
falls back to plain torch. The kernels support bfloat16 only and work in place on torch's memory.
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

MAX_HEAD_DIM = 128  # both as in attention.c and decode.c
TILE_ROWS = 96


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None if there are none for this CPU.

    The kernels use the thread pool of torch's OpenMP, whose symbols are made global here. A second
    OpenMP runtime in the process would compete for the cores.
    """
    here = Path(__file__).parent
    found = [
        path for suffix in EXTENSION_SUFFIXES if (path := here / f"_kernels{suffix}").is_file()
    ]
    openmp = _loaded_openmp()
    if not found or openmp is None:
        return None
    if any(source.stat().st_mtime > found[0].stat().st_mtime for source in here.glob("*.[ch]")):
        log.warning(
            "compiled CPU kernels are older than their sources: run `pip install -e .` again"
        )
        return None  # their signatures may differ
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
    """Return whether the kernels support tensors like `x`."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and library() is not None


@functools.cache
def has_amx() -> bool:
    """Return whether this process can use AMX, in which case torch's products are faster.

    Linux before 5.16 does not permit AMX, whatever the CPU.
    """
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


@functools.cache
def has_tiles() -> bool:
    """Return whether our attention kernels use AMX; the first call enables them.

    Requires AMX and a successful self-check of its products.
    """
    kernels = library()
    if kernels is None or not has_amx():
        return False
    found = int(kernels.octavo_check_amx())
    if found < 1:
        why = "failed the self-check" if found < 0 else "could not be checked"
        log.warning("AMX products %s: vision attention uses torch", why)
    return found > 0


def instructions() -> str:
    """Return the instruction set of the kernels' products, for logs."""
    if library() is None:
        return "no compiled kernels"
    return "AMX" if has_amx() else "AVX512-BF16"


def attends_frames() -> bool:
    """Return whether our vision attention is used. With AMX, torch is faster without tiles."""
    return not has_amx() or has_tiles()


def serves_heads(x: torch.Tensor) -> bool:
    """Return whether the attention kernels support heads like `x` [..., d]."""
    return serves(x) and x.shape[-1] % 16 == 0 and x.shape[-1] <= MAX_HEAD_DIM


# Argument types: address of a tensor, or None (p), integer (l), float (f). The number of threads is
# added as the last argument.
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
    """Declare the signatures: ctypes then checks and converts arguments ten times faster."""
    for name, letters in SIGNATURES.items():
        kernel = getattr(kernels, name)
        kernel.argtypes = [*(TYPES[letter] for letter in letters), ctypes.c_int]
        kernel.restype = None


def call(name: str, *arguments: torch.Tensor | int | float | None) -> None:
    """Run kernel `name` on torch's threads; tensors are passed by address.

    Raises TypeError for arguments that do not match SIGNATURES.
    """
    given = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
    getattr(library(), name)(*given, torch.get_num_threads())
