"""What the chunk and decode kernels share: a tile of queries over a range of a row's keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .online_softmax import fold


@triton.jit
def attend_keys(
    q,
    acc,
    top,
    total,
    place,
    begin,
    end,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    scale,
    LINE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Folds keys [begin, end) of one KV head into the sums of queries [m, d] at places [m].

    Without MASKED every query sees every key, and they fill whole tiles: nothing is compared.
    LINE: numbers from one cache block to the next. The head's offset is in the cache pointers.
    """
    offs_d = tl.arange(0, BLOCK_D)
    for at in range(begin, end, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        if MASKED:
            block = tl.load(table_ptr + keys // CACHE_BLOCK, mask=keys < end, other=0)
        else:
            block = tl.load(table_ptr + keys // CACHE_BLOCK)
        line = block.to(tl.int64) * LINE + keys % CACHE_BLOCK * HEAD_DIM
        kv_at = line[:, None] + offs_d[None, :]
        if MASKED or HEAD_DIM < BLOCK_D:
            mask = (keys < end)[:, None] & (offs_d < HEAD_DIM)[None, :]
            k = tl.load(k_cache_ptr + kv_at, mask=mask, other=0.0)
            v = tl.load(v_cache_ptr + kv_at, mask=mask, other=0.0)
        else:
            k = tl.load(k_cache_ptr + kv_at)
            v = tl.load(v_cache_ptr + kv_at)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
        if MASKED:
            scores = tl.where(keys[None, :] <= place[:, None], scores, float("-inf"))
        weights, fade, top, total = fold(scores, top, total)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, top, total
