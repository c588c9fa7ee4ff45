"""RMSNorm, with and without a preceding residual addition.

Follows transformers' `Qwen2RMSNorm`: statistics are computed in float32, and the normalized value
is rounded to the input dtype before it is multiplied by the weight.
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
    """Return compile-time settings for rows of `size`: 32 bytes per thread, 16 warps at most."""
    block = triton.next_power_of_2(size)
    warps = block * dtype.itemsize // (32 * 32)
    return {"BLOCK_SIZE": block, "num_warps": min(16, max(1, warps))}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return RMSNorm over the last dimension of x [..., size] with weight [size], in x's dtype."""
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
    """Return (RMSNorm(x + residual) × weight, x + residual).

    x and residual are [..., size] of one dtype, weight is [size].
    """
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
    """Compute `rms_norm` in plain torch (test oracle): x [..., size], weight [size]."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `add_rms_norm` in plain torch (test oracle): x, residual [..., size]."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total
