"""Tile selection and split-K, shared by the matrix products with quantized weights.

Split-K distributes the inputs of a product of few rows over enough programs to use all SMs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import LINEARS, Launch, architecture

MAX_SPLIT_ROWS = 64
MIN_INPUTS = 512  # per split, at least
OUTPUTS = 64  # per narrowest tile
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
    """Sum BLOCK_N outputs of a token per program; parts are float32 [SPLITS, n, out]."""
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
    """Return the name of the tile for n rows.

    This is the narrowest tile that holds them; for more rows, the largest that uses all SMs.
    """
    sizes = LINEARS[kernel][arch]
    for name in ("few", "some", "more"):
        if n <= sizes[name].block_m:
            return name
    for name in ("wide", "many"):
        if count_tiles(sizes[name], n, out_size) >= processors:
            return name
    return "more"


def linear_launch(kernel: str, arch: str, n: int, out_size: int, processors: int) -> Launch:
    """Return the launch settings of `kernel` for n rows; see `linear_size`."""
    return LINEARS[kernel][arch][linear_size(kernel, arch, n, out_size, processors)]


def count_tiles(chosen: Launch, n: int, out_size: int) -> int:
    """Return the number of tiles of an output [n, out_size]."""
    return triton.cdiv(out_size, chosen.block_n) * triton.cdiv(n, chosen.block_m)


def split_size(n: int, in_size: int, out_size: int, unit: int, processors: int) -> int:
    """Return the number of input units, of `unit` inputs each, that a program sums.

    Up to MAX_SPLIT_ROWS rows it depends on the layer's shape only, so that results do not depend
    on the rest of the batch. Parts are added in a fixed order.
    """
    units = triton.cdiv(in_size, unit)
    if n > MAX_SPLIT_ROWS:
        return units
    wanted = 2 * processors // triton.cdiv(out_size, OUTPUTS)
    return triton.cdiv(units, max(1, min(wanted, in_size // MIN_INPUTS)))


def make_parts(splits: int, out: torch.Tensor) -> torch.Tensor:
    """Return the output of the partial sums: `out` [n, out], or float32 [splits, n, out]."""
    if splits == 1:
        return out
    return torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)


def join_parts(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write the sum of `parts` [splits, n, out], plus bias [out], to `out` [n, out]."""
    n, out_size = out.shape
    chosen = join_settings(out_size, len(parts), bias is not None)
    grid = (n, triton.cdiv(out_size, JOIN_BLOCK))
    _join_parts_kernel[grid](parts, out if bias is None else bias, out, n, **chosen)


def join_settings(out_size: int, splits: int, has_bias: bool) -> dict[str, int | bool]:
    """Return compile-time settings of the join kernel."""
    return {"OUT": out_size, "SPLITS": splits, "HAS_BIAS": has_bias, "BLOCK_N": JOIN_BLOCK}


def place(device: torch.device) -> tuple[int, str]:
    """Return (number of SMs, architecture) of a device; an H100's for Triton's interpreter."""
    if device.type != "cuda":
        return 132, architecture(device)
    return torch.cuda.get_device_properties(device).multi_processor_count, architecture(device)
