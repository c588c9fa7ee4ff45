"""FP8 matrix products (e4m3, W8A8) for sm_90 and sm_100, whose tensor cores support FP8.

Weights have a scale per output channel. Activations are quantized dynamically with a scale per
token, or with one static scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import uses_triton
from .split_linear import join_parts, linear_launch, make_parts, place, split_size

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MIN_SCALE = 1e-12  # scale of a row of zeros
BLOCK_K = 128


@triton.jit
def _quantize_rows_kernel(x_ptr, out_ptr, scale_ptr, x_stride, SIZE: tl.constexpr,
                          BLOCK: tl.constexpr, STATIC: tl.constexpr):  # fmt: skip
    """Quantize a token per program. STATIC: use the given scale and saturate."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
    if STATIC:
        scale = tl.load(scale_ptr + row)
    else:
        scale = tl.maximum(tl.max(tl.abs(x)) / 448.0, 1e-12)
        tl.store(scale_ptr + row, scale)
    x = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
    tl.store(out_ptr + row * SIZE + offs, x.to(tl.float8e4nv), mask=mask)


@triton.jit
def _fp8_linear_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    n,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Compute BLOCK_N outputs of BLOCK_M tokens over SPLIT × BLOCK_K inputs per program.

    The product is transposed, outᵀ = weight × xᵀ, so that few tokens make a narrow tile. Partial
    sums are promoted to float32 every BLOCK_K inputs, because sm_90 accumulates with lower
    precision. `out` is [n, out], or float32 [splits, n, out] with split-K.
    """
    split = tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    n_mask, m_mask = offs_n < OUT, offs_m < n
    # Surplus rows of the last tile wrap around, which needs no mask.
    weight_at = weight_ptr + (offs_n % OUT)[:, None].to(tl.int64) * IN + offs_k[None, :]
    x_at = x_ptr + offs_m[:, None].to(tl.int64) * IN + offs_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = split * SPLIT * BLOCK_K
    for k in range(first, tl.minimum(first + SPLIT * BLOCK_K, IN), BLOCK_K):
        if IN % BLOCK_K:
            k_mask = (k + offs_k < IN)[None, :]
            weight = tl.load(weight_at + k, mask=k_mask, other=0.0)
            x = tl.load(x_at + k, mask=m_mask[:, None] & k_mask, other=0.0)
        else:
            weight = tl.load(weight_at + k)
            x = tl.load(x_at + k, mask=m_mask[:, None], other=0.0)
        acc = tl.dot(weight, x.T, acc, max_num_imprecise_acc=BLOCK_K)
    x_scale = tl.load(x_scale_ptr + offs_m, mask=m_mask, other=0.0)
    scale = tl.load(weight_scale_ptr + offs_n, mask=n_mask, other=0.0)
    acc = acc * scale[:, None] * x_scale[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + (split * n + offs_m[None, :]).to(tl.int64) * OUT + offs_n[:, None]
    mask = n_mask[:, None] & m_mask[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def settings(
    n: int, in_size: int, out_size: int, processors: int, arch: str
) -> dict[str, int | str]:
    """Return compile-time settings for n tokens on a GPU with `processors` SMs."""
    chosen = linear_launch("fp8", arch, n, out_size, processors)
    split = split_size(n, in_size, out_size, BLOCK_K, processors)
    return {**chosen.settings(), "BLOCK_K": BLOCK_K, "SPLIT": split}


def quantize_settings(size: int) -> dict[str, int]:
    """Return compile-time settings of the quantization kernel for rows of `size`."""
    block = triton.next_power_of_2(size)
    return {"SIZE": size, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def check_fp8(device: torch.device) -> None:
    """Raise ValueError if the device's tensor cores do not support e4m3."""
    if device.type == "cuda" and (
        torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0)
    ):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{name}: has no FP8 products; serve a bfloat16, AWQ or GPTQ checkpoint")


def quantize_rows_fp8(
    x: torch.Tensor, static_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [n, in] to e4m3; return it with the scale of each row, float32 [n].

    static_scale: [1], used for all rows if given.
    """
    if not uses_triton(x):
        return quantize_rows_fp8_ref(x, static_scale)
    x = x if x.stride(1) == 1 else x.contiguous()
    n, size = x.shape
    out = torch.empty((n, size), dtype=FP8, device=x.device)
    static = static_scale is not None
    scale = torch.empty(n, dtype=torch.float32, device=x.device)
    if static_scale is not None:
        scale.copy_(static_scale.expand(n))
    _quantize_rows_kernel[(n,)](
        x, out, scale, x.stride(0), STATIC=static, **quantize_settings(size)
    )
    return out, scale


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    static_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x × weightᵀ × scale + bias, [n, out] in x's dtype.

    Args:
        x: [n, in].
        weight: e4m3 [out, in].
        scale: float32 [out].
        bias: [out] or None.
        static_scale: Activation scale [1]; None computes one per token.

    Raises ValueError on a GPU without FP8 tensor cores.
    """
    if not uses_triton(x):
        return fp8_linear_ref(x, weight, scale, bias, static_scale)
    check_fp8(x.device)
    rows, row_scale = quantize_rows_fp8(x, static_scale)
    n, (out_size, in_size) = len(x), weight.shape
    out = torch.empty((n, out_size), dtype=x.dtype, device=x.device)
    chosen = settings(n, in_size, out_size, *place(x.device))
    splits = triton.cdiv(in_size, BLOCK_K * int(chosen["SPLIT"]))
    parts = make_parts(splits, out)
    tiles = (triton.cdiv(out_size, chosen["BLOCK_N"]), triton.cdiv(n, chosen["BLOCK_M"]))
    _fp8_linear_kernel[(*tiles, splits)](
        rows, weight, row_scale, scale, x if bias is None else bias, parts, n,
        IN=in_size, OUT=out_size, HAS_BIAS=bias is not None and splits == 1, **chosen,
    )  # fmt: skip
    if splits > 1:
        join_parts(parts, bias, out)
    return out


def quantize_rows_fp8_ref(
    x: torch.Tensor, static_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `quantize_rows_fp8` in plain torch (test oracle); same result."""
    wide = x.float()
    scale = (wide.abs().amax(1) / FP8_MAX).clamp(min=MIN_SCALE)
    if static_scale is not None:
        scale = static_scale.float().expand(len(x))
    return (wide / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def fp8_linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    static_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `fp8_linear` in float64 (test oracle); same arguments and result."""
    rows, row_scale = quantize_rows_fp8_ref(x, static_scale)
    product = (rows.double() * row_scale[:, None]) @ (weight.double() * scale[:, None]).T
    return (product if bias is None else product + bias.double()).to(x.dtype)
