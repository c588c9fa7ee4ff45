"""Matrix products with 4-bit weights (weight-only: activations are bfloat16 or float16).

The product is transposed, outᵀ = weight × xᵀ: a tile of weights is unpacked in registers, from
which tensor cores read their first operand (HGMMA on sm_90), and few tokens make a narrow tile. A
shift and a mask extract two weights from a word. The four bits become the highest mantissa bits of
a 16-bit float, whose value is then exactly 16 + q. The excess is subtracted per group, as
(16 + zero) × (sum of x in the group), so that single weights need no arithmetic.

Scales are applied in float32, without rounding. A single accumulator is kept, in units of the
current group's scale, and is rescaled at each group; a second one would double the registers. So
no scale may be zero (ensured by `pack_int4`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import uses_triton
from .int4_layout import BLOCK, PackedInt4, unpack_int4
from .split_linear import join_parts, linear_launch, make_parts, place, split_size

# Bits of 16.0, and the lowest of the four highest mantissa bits.
SIXTEEN = {torch.float16: (0x4C00, 6), torch.bfloat16: (0x4180, 3)}


@triton.jit
def _two_weights(words, sixteens, J: tl.constexpr, PLACE: tl.constexpr, dtype: tl.constexpr):
    """Return 16 + q of chunk J: words [rows, 32] -> [rows, 64]."""
    if 4 * J < PLACE:  # noqa: SIM108
        moved = words << (PLACE - 4 * J)
    else:
        moved = words >> (4 * J - PLACE)
    two = (moved & (0x000F000F << PLACE)) | sixteens
    low = two.to(tl.int16).to(dtype, bitcast=True)
    high = (two >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def _int4_linear_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    n,
    x_stride,
    sixteens,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    PLACE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    ONES: tl.constexpr,
):
    """Compute BLOCK_N outputs of BLOCK_M tokens over SPLIT blocks of 256 inputs per program.

    `sixteens` is 16.0 twice. It is an argument, because mask and `or` compile to one instruction
    only if one of the two is in a register. `out` is [n, out], or float32 [splits, n, out] with
    split-K.
    """
    BLOCK_K: tl.constexpr = 256
    CHUNKS: tl.constexpr = GROUP // 64
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    BLOCKS: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    split = tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, 64)
    n_mask = offs_n < OUT
    m_mask = offs_m < n
    words_at = words_ptr + offs_n[:, None] * 32 + tl.arange(0, 32)[None, :]
    x_at = x_ptr + offs_m[:, None].to(tl.int64) * x_stride + offs_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    unit = tl.full((BLOCK_N,), 1.0, tl.float32)
    first = split * SPLIT
    for block in range(first, tl.minimum(first + SPLIT, BLOCKS)):
        words = tl.load(words_at + block * (OUT * 32), mask=n_mask[:, None], other=0)
        for group in tl.static_range(GROUPS):
            to = (block * GROUPS + group) * OUT + offs_n
            scale = tl.load(scales_ptr + to, mask=n_mask, other=1.0).to(tl.float32)
            zero = tl.load(zeros_ptr + to, mask=n_mask, other=0).to(tl.float32) + 16.0
            acc *= (unit / scale)[:, None]
            unit = scale
            if ONES:
                total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for chunk in tl.static_range(CHUNKS):
                k = block * BLOCK_K + (group * CHUNKS + chunk) * 64
                if IN % BLOCK_K == 0:
                    x = tl.load(x_at + k, mask=m_mask[:, None], other=0.0)
                else:
                    mask = m_mask[:, None] & (k + offs_k[None, :] < IN)
                    x = tl.load(x_at + k, mask=mask, other=0.0)
                weights = _two_weights(words, sixteens, group * CHUNKS + chunk, PLACE, dtype)
                if ONES:
                    ones = tl.full((BLOCK_N, 64), 1.0, dtype)
                    total = tl.dot(ones, x.T, total)
                else:
                    weights -= zero.to(dtype)[:, None]
                acc = tl.dot(weights, x.T, acc)
            if ONES:
                acc -= zero[:, None] * total
    acc *= unit[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + (split * n + offs_m[None, :]).to(tl.int64) * OUT + offs_n[:, None]
    mask = n_mask[:, None] & m_mask[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def settings(
    n: int, in_size: int, out_size: int, processors: int, arch: str
) -> dict[str, int | str | bool]:
    """Return compile-time settings for n tokens on a GPU with `processors` SMs."""
    chosen = linear_launch("int4", arch, n, out_size, processors)
    split = split_size(n, in_size, out_size, BLOCK, processors)
    return {**chosen.settings(), "SPLIT": split, "ONES": chosen.block_m == 16 and arch == "sm_90"}


def int4_linear(
    x: torch.Tensor, weight: PackedInt4, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x × weightᵀ + bias, [n, out] in x's dtype.

    x: bfloat16 or float16 [n, in]. bias: [out] or None. Raises AssertionError on a GPU for other
    dtypes of x.
    """
    if not uses_triton(x):
        return int4_linear_ref(x, weight, bias)
    assert x.dtype in SIXTEEN, f"{x.dtype}: 4-bit weights require bfloat16 or float16"
    x = x if x.stride(1) == 1 else x.contiguous()
    bits, moved = SIXTEEN[x.dtype]
    n, (blocks, out_size, _) = len(x), weight.words.shape
    chosen = settings(n, weight.in_size, out_size, *place(x.device))
    splits = triton.cdiv(blocks, int(chosen["SPLIT"]))
    out = torch.empty((n, out_size), dtype=x.dtype, device=x.device)
    parts = make_parts(splits, out)
    tiles = (triton.cdiv(out_size, chosen["BLOCK_N"]), triton.cdiv(n, chosen["BLOCK_M"]))
    _int4_linear_kernel[(*tiles, splits)](
        x,
        weight.words,
        weight.scales,
        weight.zeros,
        x if bias is None else bias,
        parts,
        n,
        x.stride(0),
        bits * 0x10001,
        IN=weight.in_size,
        OUT=out_size,
        GROUP=weight.group_size,
        PLACE=moved,
        HAS_BIAS=bias is not None and splits == 1,
        **chosen,
    )
    if splits > 1:
        join_parts(parts, bias, out)
    return out


def int4_linear_ref(
    x: torch.Tensor, weight: PackedInt4, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute `int4_linear` in float64 (test oracle), for x [n, in] of any dtype."""
    product = x.double() @ unpack_int4(weight).dequantize().double().T
    return (product if bias is None else product + bias.double()).to(x.dtype)
