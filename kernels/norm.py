"""RMSNorm, alone and with the residual sum before it.

Reference of behaviour: `Qwen2RMSNorm` of transformers: statistics in float32, the normed value
rounded to the input's dtype before the weight is applied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import native
from .device import uses_triton


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    eps,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    offs = tl.arange(0, BLOCK_SIZE)
    mask = offs < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + offs
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, x, mask=mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / SIZE + eps)
    normed = (x * scale).to(out_ptr.dtype.element_ty)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + at, normed * weight, mask=mask)


def settings(size: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time settings for rows of `size`: a thread has 32 bytes, up to 16 warps."""
    block = triton.next_power_of_2(size)
    warps = block * dtype.itemsize // (32 * 32)
    return {"BLOCK_SIZE": block, "num_warps": min(16, max(1, warps))}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [n, size] normed by row, times weight [size]."""
    if native.serves(x):
        return _native_rms_norm(x, None, weight, eps)[0]
    if not uses_triton(x):
        return rms_norm_ref(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    grid, chosen = (x.numel() // size,), settings(size, x.dtype)
    _rms_norm_kernel[grid](x, x, weight, out, out, eps, SIZE=size, HAS_RESIDUAL=False, **chosen)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, both [n, size], and the sum itself."""
    if native.serves(x):
        return _native_rms_norm(x, residual, weight, eps)
    if not uses_triton(x):
        return add_rms_norm_ref(x, residual, weight, eps)
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    grid, chosen = (x.numel() // size,), settings(size, x.dtype)
    _rms_norm_kernel[grid](
        x, residual, weight, out, total, eps, SIZE=size, HAS_RESIDUAL=True, **chosen
    )
    return out, total


def _native_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    total = x if residual is None else torch.empty_like(x)
    rows = x.numel() // size
    native.call("octavo_rms_norm", x, residual, weight, out, total, rows, size, float(eps))
    return out, total


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return rms_norm_ref(total, weight, eps), total
