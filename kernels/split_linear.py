"""What the products with quantised weights share: tiles by the number of rows, and the split over
inputs with which a few rows give every processor work."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import LINEARS, Launch, architecture

MAX_SPLIT_ROWS = 64
MIN_INPUTS = 512  # of a split
OUTPUTS = 64  # of the narrowest tile
JOIN_BLOCK = 1024


@triton.jit
def _join_parts_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    n,
    OUT: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N outputs of a token, the sum of its parts float32 [SPLITS, n, out]."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < OUT
    total = tl.zeros((BLOCK_N,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + (split * n + row) * OUT + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * OUT + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def linear_size(kernel: str, arch: str, n: int, out_size: int, processors: int) -> str:
    """Which of the table's tiles serve n rows: the narrowest that hold them; of more rows the
    largest that give every processor work."""
    sizes = LINEARS[kernel][arch]
    for name in ("few", "some", "more"):
        if n <= sizes[name].block_m:
            return name
    for name in ("wide", "many"):
        if count_tiles(sizes[name], n, out_size) >= processors:
            return name
    return "more"


def linear_launch(kernel: str, arch: str, n: int, out_size: int, processors: int) -> Launch:
    return LINEARS[kernel][arch][linear_size(kernel, arch, n, out_size, processors)]


def count_tiles(chosen: Launch, n: int, out_size: int) -> int:
    return triton.cdiv(out_size, chosen.block_n) * triton.cdiv(n, chosen.block_m)


def split_size(n: int, in_size: int, out_size: int, unit: int, processors: int) -> int:
    """Units of `unit` inputs that a program adds up, for n rows.

    The cut follows from the layer alone, up to MOST_SPLIT_ROWS rows: what else is in a batch does
    not change where a row's sums are cut. Parts are added in their order.
    """
    units = triton.cdiv(in_size, unit)
    if n > MAX_SPLIT_ROWS:
        return units
    wanted = 2 * processors // triton.cdiv(out_size, OUTPUTS)
    return triton.cdiv(units, max(1, min(wanted, in_size // MIN_INPUTS)))


def make_parts(splits: int, out: torch.Tensor) -> torch.Tensor:
    """Where programs put what they added up: `out` [n, out], or float32 [splits, n, out]."""
    if splits == 1:
        return out
    return torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)


def join_parts(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Writes the sum of `parts` and the bias to `out`."""
    n, out_size = out.shape
    chosen = join_settings(out_size, len(parts), bias is not None)
    grid = (n, triton.cdiv(out_size, JOIN_BLOCK))
    _join_parts_kernel[grid](parts, out if bias is None else bias, out, n, **chosen)


def join_settings(out_size: int, splits: int, has_bias: bool) -> dict[str, int | bool]:
    """Compile-time settings of the kernel that adds up parts."""
    return {"OUT": out_size, "SPLITS": splits, "HAS_BIAS": has_bias, "BLOCK_N": JOIN_BLOCK}


def place(device: torch.device) -> tuple[int, str]:
    """Processors and architecture of a device; of an H100 in the interpreter."""
    if device.type != "cuda":
        return 132, architecture(device)
    return torch.cuda.get_device_properties(device).multi_processor_count, architecture(device)
