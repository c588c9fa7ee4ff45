"""Attention of prompts and of their chunks over the paged cache.

Query heads that share a KV head and several query tokens are packed into one tile, so that one load
of a key serves them all. Source: FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_batch import AttentionBatch
from .launch import LOG2_E, paged_settings


@triton.jit
def _paged_chunk_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    block_tables_ptr,
    tile_row_ptr,
    tile_start_ptr,
    table_stride,
    scale,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M // GROUP query tokens of a row, with the heads of one KV head."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tile_row_ptr + tile)
    first = tl.load(cu_seqlens_q_ptr + row)
    length = tl.load(cu_seqlens_q_ptr + row + 1) - first
    context = tl.load(context_lens_ptr + row)
    start = tl.load(tile_start_ptr + tile)
    TOKENS: tl.constexpr = BLOCK_M // GROUP

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    token = start + offs_m // GROUP
    valid = (offs_m < TOKENS * GROUP) & (token < length)
    place = context - length + token  # in the whole request
    head = kv_head * GROUP + offs_m % GROUP
    at = ((first + token) * (NUM_KV_HEADS * GROUP) + head).to(tl.int64) * HEAD_DIM
    d_mask = offs_d < HEAD_DIM
    q_mask = valid[:, None] & d_mask[None, :]
    q = tl.load(q_ptr + at[:, None] + offs_d[None, :], mask=q_mask, other=0.0)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum(context, context - length + start + TOKENS)
    for begin in range(0, end, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        key_mask = keys < end
        block = tl.load(
            block_tables_ptr + row.to(tl.int64) * table_stride + keys // CACHE_BLOCK,
            mask=key_mask,
            other=0,
        ).to(tl.int64)
        line = (block * NUM_KV_HEADS + kv_head) * CACHE_BLOCK + keys % CACHE_BLOCK
        kv_at = line[:, None] * HEAD_DIM + offs_d[None, :]
        kv_mask = key_mask[:, None] & d_mask[None, :]
        k = tl.load(k_cache_ptr + kv_at, mask=kv_mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
        seen = (keys[None, :] <= place[:, None]) & key_mask[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: every place sees key 0
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        top = new_top
        v = tl.load(v_cache_ptr + kv_at, mask=kv_mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] + offs_d[None, :], out, mask=q_mask)


def chunk_settings(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> dict[str, int | str]:
    """Compile-time settings of the chunk kernel. float32, which serves comparisons, takes half the
    tile; it still spills on sm_90 and sm_100."""
    tokens = 128 if dtype.itemsize == 2 else 64
    chosen = paged_settings(num_heads, num_kv_heads, head_dim, block_size, dtype)
    return {
        **chosen,
        "BLOCK_M": max(tokens, triton.next_power_of_2(num_heads // num_kv_heads)),
        "BLOCK_N": 64 if dtype.itemsize == 2 else 32,
        "num_warps": 8,
        "num_stages": 2,
    }


def launch_chunks(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    out: torch.Tensor,
    chosen: dict[str, int | str],
) -> None:
    size = int(chosen["BLOCK_M"]) // int(chosen["GROUP"])
    counts = batch.num_scheduled_tokens
    tiles = [(row, at) for row in batch.chunk_rows for at in range(0, counts[row], size)]
    rows, starts = torch.tensor(tiles, dtype=torch.int32).T.contiguous().to(q.device)
    _paged_chunk_kernel[(len(tiles), k_cache.shape[1])](
        q,
        k_cache,
        v_cache,
        out,
        batch.cu_seqlens_q,
        batch.context_lens,
        batch.block_tables,
        rows,
        starts,
        batch.block_tables.stride(0),
        scale * LOG2_E,
        **chosen,
    )
