"""Shared part of the chunk and decode kernels: a tile of queries over a range of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .online_softmax import fold

# e4m3 has 4 exponent bits with a bias of 7. Moved to a wider format, its bits make a value that is
# too small by the difference of the biases: 2^8 in float16, 2^120 in bfloat16. The scales
# compensate for it, so that elements need no multiplication. In bfloat16 half of the factor is
# applied to queries and results, so that no product overflows float32.
FLOAT16_LIFT = tl.constexpr(2.0**8)
BFLOAT16_LIFT = tl.constexpr(2.0**60)


@triton.jit
def e4m3_bits_moved(words, like):
    """Convert e4m3 in int16 words [n, d / 2] to `like`'s dtype [n, d], times 2^-8 or 2^-120.

    Exact, including subnormals. Uses integer operations only, which every GPU supports. The masks
    0x87F0 and 0xBF80 keep sign, exponent and fraction, without the sign copies of the shift.
    """
    if like.dtype == tl.bfloat16:
        low = (((words << 8) >> 4) & -0x7810).to(tl.bfloat16, bitcast=True)
        high = ((words >> 4) & -0x7810).to(tl.bfloat16, bitcast=True)
    else:
        low = (((words << 8) >> 1) & -0x4080).to(tl.float16, bitcast=True)
        high = ((words >> 1) & -0x4080).to(tl.float16, bitcast=True)
    return tl.interleave(low, high).to(like.dtype)


@triton.jit
def lifted_scales(k_scale_ptr, v_scale_ptr, slot, there, like, MASKED: tl.constexpr):
    """Return the scales of keys and values in slots [n], times LIFT.

    For invalid slots, the key scale is that of block 0, which is masked later, and the value scale
    is 0.
    """
    LIFT: tl.constexpr = BFLOAT16_LIFT if like.dtype == tl.bfloat16 else FLOAT16_LIFT
    k_scale = tl.load(k_scale_ptr + slot)
    if MASKED:
        v_scale = tl.load(v_scale_ptr + slot, mask=there, other=0.0)
    else:
        v_scale = tl.load(v_scale_ptr + slot)
    return k_scale * LIFT, v_scale * LIFT


@triton.jit
def attend_keys(
    q,
    acc,
    top,
    total,
    pos,
    begin,
    end,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    scale,
    LINE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    FP8: tl.constexpr,
):
    """Accumulate keys [begin, end) of one KV head, for queries [m, d] at positions pos [m].

    If not MASKED, every query sees every key, and the keys must fill whole tiles. LINE: elements
    per cache block. ROW: elements per slot, which is the head size, or half of it if FP8 (two
    values per element). The cache and scale pointers include the head's offset.
    """
    offs_d = tl.arange(0, BLOCK_ROW)
    for at in range(begin, end, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        if MASKED:
            block = tl.load(table_ptr + keys // CACHE_BLOCK, mask=keys < end, other=0)
        else:
            block = tl.load(table_ptr + keys // CACHE_BLOCK)
        line = block.to(tl.int64) * LINE + keys % CACHE_BLOCK * ROW
        kv_at = line[:, None] + offs_d[None, :]
        if MASKED or ROW < BLOCK_ROW:
            mask = (keys < end)[:, None] & (offs_d < ROW)[None, :]
            k = tl.load(k_cache_ptr + kv_at, mask=mask, other=0.0)
            v = tl.load(v_cache_ptr + kv_at, mask=mask, other=0.0)
        else:
            k = tl.load(k_cache_ptr + kv_at)
            v = tl.load(v_cache_ptr + kv_at)
        if FP8:
            slot = block.to(tl.int64) * (LINE // ROW) + keys % CACHE_BLOCK
            k_scale, v_scale = lifted_scales(k_scale_ptr, v_scale_ptr, slot, keys < end, q, MASKED)
            k, v = e4m3_bits_moved(k, q), e4m3_bits_moved(v, q)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
        if FP8:
            scores = scores * k_scale[None, :]
        if MASKED:
            scores = tl.where(keys[None, :] <= pos[:, None], scores, float("-inf"))
        weights, fade, top, total = fold(scores, top, total)
        if FP8:
            weights = weights * v_scale[None, :]
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def attend_cache(
    q,
    top,
    pos,
    begin,
    whole,
    end,
    kv_head,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8: tl.constexpr,
):
    """Attend keys [begin, end) of a KV head, for queries [m, d] at positions pos [m].

    `top` [m] is the initial maximum of the scores. Keys before `whole` fill whole tiles and are
    visible to every query. Returns (unnormalized weighted values [m, d], new `top`, sums of
    weights [m]).
    """
    ROW: tl.constexpr = HEAD_DIM // 2 if FP8 else HEAD_DIM
    BLOCK_ROW: tl.constexpr = BLOCK_D // 2 if FP8 else BLOCK_D
    LINE: tl.constexpr = NUM_KV_HEADS * CACHE_BLOCK * ROW
    k_cache_ptr += kv_head * CACHE_BLOCK * ROW
    v_cache_ptr += kv_head * CACHE_BLOCK * ROW
    if FP8:
        k_scale_ptr += kv_head * CACHE_BLOCK
        v_scale_ptr += kv_head * CACHE_BLOCK
        if q.dtype == tl.bfloat16:
            q = q * BFLOAT16_LIFT
    total = tl.zeros_like(top)
    acc = tl.zeros(q.shape, tl.float32)
    acc, top, total = attend_keys(
        q, acc, top, total, pos, begin, whole, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr,
        table_ptr, scale, LINE, ROW, BLOCK_ROW, BLOCK_N, CACHE_BLOCK, PRECISION, False, FP8,
    )  # fmt: skip
    acc, top, total = attend_keys(
        q, acc, top, total, pos, whole, end, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr,
        table_ptr, scale, LINE, ROW, BLOCK_ROW, BLOCK_N, CACHE_BLOCK, PRECISION, True, FP8,
    )  # fmt: skip
    if FP8 and q.dtype == tl.bfloat16:
        acc = acc * BFLOAT16_LIFT
    return acc, top, total
