"""M-RoPE, fused with the write of keys and values to the paged cache.

`mrope_section` distributes a head's frequencies over the three position axes (temporal, height,
width). Sources: the Qwen2-VL paper, section 2.1, and `apply_multimodal_rotary_pos_emb` of
transformers. Angles and products are computed in float32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import native
from .device import uses_triton
from .kv_cache import Cache, Fp8Cache, kernel_arguments, write_kv


def mrope_cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, mrope_section: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines, float32 [n, head_dim / 2].

    positions: int32 [3, n]. inv_freq: float32 [head_dim / 2]. mrope_section: frequencies per axis;
    they sum to head_dim / 2.
    """
    axis = _axis_of_frequency(mrope_section, positions.device)
    angles = positions.float()[axis].T * inv_freq.to(positions.device)
    return angles.cos(), angles.sin()


@lru_cache  # CUDA graph capture allows no copy from the host
def _axis_of_frequency(mrope_section: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Return the position axis of each frequency, int64 [head_dim / 2]."""
    return torch.repeat_interleave(torch.arange(3), torch.tensor(mrope_section)).to(device)


@triton.jit
def e4m3_bits(x):
    """Return the e4m3 bits (uint8) nearest to float32 x, |x| <= 448, ties to even.

    Uses integer operations only, which every GPU supports.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (
        120 << 3
    )  # exponent biases are 127 and 7
    steps = (tl.abs(x) + 16384.0).to(
        tl.int32, bitcast=True
    ) - 0x46800000  # |x| in units of 2^-9, float32's at 2^14
    found = tl.where(size < 0x3C800000, steps, normal)  # below 2^-6: e4m3 subnormals
    return (found | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _write_fp8(first, second, cache_ptr, scale_ptr, row, offs, mask, HEAD_DIM: tl.constexpr):
    """Quantize and write the two halves of a row, and its scale. NaN makes the scale NaN."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second))) + tl.sum((first + second) * 0.0)
    scale = largest / 448.0
    scale = tl.where(scale < 1e-12, 1e-12, scale)
    first = tl.minimum(tl.maximum(first / scale, -448.0), 448.0)
    second = tl.minimum(tl.maximum(second / scale, -448.0), 448.0)
    to = cache_ptr + row * HEAD_DIM + offs
    tl.store(to, e4m3_bits(first), mask=mask)
    tl.store(to + HEAD_DIM // 2, e4m3_bits(second), mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _mrope_write_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    slot_mapping_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_stride,
    k_stride,
    v_stride,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    FP8: tl.constexpr,
):
    """Process a token's KV head and its GROUP query heads per program."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    offs = tl.arange(0, BLOCK_HALF)
    mask = offs < HALF
    cos = tl.load(cos_ptr + token * HALF + offs, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + offs, mask=mask, other=0.0)

    heads = tl.arange(0, BLOCK_GROUP)
    at = (kv_head * GROUP + heads[:, None]) * HEAD_DIM + offs[None, :]
    q_mask = (heads[:, None] < GROUP) & mask[None, :]
    q = q_ptr + token * q_stride + at
    first = tl.load(q, mask=q_mask, other=0.0).to(tl.float32)
    second = tl.load(q + HALF, mask=q_mask, other=0.0).to(tl.float32)
    out = out_ptr + token * (NUM_KV_HEADS * GROUP * HEAD_DIM) + at
    dtype = out_ptr.dtype.element_ty
    tl.store(out, (first * cos[None, :] - second * sin[None, :]).to(dtype), mask=q_mask)
    tl.store(out + HALF, (second * cos[None, :] + first * sin[None, :]).to(dtype), mask=q_mask)

    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot >= 0:
        row = (slot // CACHE_BLOCK * NUM_KV_HEADS + kv_head) * CACHE_BLOCK + slot % CACHE_BLOCK
        k = k_ptr + token * k_stride + kv_head * HEAD_DIM + offs
        first_k = tl.load(k, mask=mask, other=0.0).to(tl.float32)
        second_k = tl.load(k + HALF, mask=mask, other=0.0).to(tl.float32)
        k0 = (first_k * cos - second_k * sin).to(dtype)
        k1 = (second_k * cos + first_k * sin).to(dtype)
        v = v_ptr + token * v_stride + kv_head * HEAD_DIM + offs
        v0 = tl.load(v, mask=mask, other=0.0)
        v1 = tl.load(v + HALF, mask=mask, other=0.0)
        if FP8:
            _write_fp8(k0, k1, k_cache_ptr, k_scale_ptr, row, offs, mask, HEAD_DIM)
            _write_fp8(v0, v1, v_cache_ptr, v_scale_ptr, row, offs, mask, HEAD_DIM)
        else:
            to = row * HEAD_DIM + offs
            tl.store(k_cache_ptr + to, k0, mask=mask)
            tl.store(k_cache_ptr + to + HALF, k1, mask=mask)
            tl.store(v_cache_ptr + to, v0, mask=mask)
            tl.store(v_cache_ptr + to + HALF, v1, mask=mask)


def settings(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, fp8: bool = False
) -> dict[str, int]:
    """Return compile-time settings of the kernel. `fp8`: the cache holds e4m3."""
    group = num_heads // num_kv_heads
    return {
        "GROUP": group,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_GROUP": triton.next_power_of_2(group),
        "BLOCK_HALF": triton.next_power_of_2(head_dim // 2),
        "CACHE_BLOCK": block_size,
        "FP8": fp8,
        "num_warps": 1 if group * head_dim <= 1024 else 4,
    }


def mrope_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys; write keys and values to their cache slots.

    Args:
        q: [n, heads, d]; k, v: [n, kv_heads, d]. Tokens may be strided (views of one QKV tensor),
            heads must be contiguous.
        cos, sin: float32 [n, d / 2] from `mrope_cos_sin`.
        k_cache, v_cache: [num_blocks, kv_heads, block_size, d], in q's dtype or e4m3.
        slot_mapping: int64 [n]; -1 writes nothing.

    Returns the rotated queries [n, heads, d]. Raises AssertionError for other strides.
    """
    fp8 = isinstance(k_cache, Fp8Cache)
    compiled = native.serves(q) and isinstance(k_cache, torch.Tensor) and q.dtype == k_cache.dtype
    if not compiled and not uses_triton(q):
        return mrope_write_kv_ref(q, k, v, cos, sin, k_cache, v_cache, slot_mapping)
    n, num_heads, head_dim = q.shape
    for part in (q, k, v):
        assert part.stride()[1:] == (head_dim, 1), "the heads of a token must be contiguous"
    num_kv_heads, block_size = k_cache.shape[1:3]
    out = torch.empty((n, num_heads, head_dim), dtype=q.dtype, device=q.device)
    cos, sin = cos.contiguous(), sin.contiguous()
    parts = kernel_arguments(k_cache, v_cache, torch.uint8)
    if compiled:
        assert k.stride() == v.stride(), "k and v must have equal strides"
        sizes = (n, num_heads, num_kv_heads, head_dim, block_size)
        native.call(
            "octavo_mrope_write_kv",
            *(q, q.stride(0), k, v, k.stride(0), cos, sin, slot_mapping, out, *parts[:2]),
            *sizes,
        )
        return out
    _mrope_write_kv_kernel[(n, num_kv_heads)](
        q,
        k,
        v,
        cos,
        sin,
        slot_mapping,
        out,
        *parts,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        **settings(num_heads, num_kv_heads, head_dim, block_size, fp8),
    )
    return out


def rotate_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [n, heads, d] by cos and sin, float32 [n, d / 2].

    The compiled CPU kernel works in place and returns x itself.
    """
    n, heads, head_dim = x.shape
    if not native.serves(x) or x.stride()[1:] != (head_dim, 1):
        return rotate_ref(x, cos, sin)
    native.call("octavo_rotate", x, x.stride(0), cos, sin, n, heads, head_dim)
    return x


def rotate_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [n, heads, d] by cos and sin [n, d / 2] in plain torch (test oracle).

    Element i is paired with element i + d / 2.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def mrope_write_kv_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Compute `mrope_write_kv` in plain torch (test oracle); same arguments and result."""
    write_kv(rotate_ref(k, cos, sin), v, k_cache, v_cache, slot_mapping)
    return rotate_ref(q, cos, sin)
