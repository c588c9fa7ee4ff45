"""Attention of rows that compute one token, over the paged cache.

Query heads that share a KV head are packed into one tile. Rows are cut over their keys into splits
of a fixed size, so that the order of additions, and with it the result, does not depend on what
else is in the batch; a second kernel joins the splits. Source: Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_batch import AttentionBatch
from .launch import LOG2_E, paged_settings

SPLIT_SIZE = 256  # keys of one split


@triton.jit
def _paged_decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    partial_ptr,
    lse_ptr,
    decode_rows_ptr,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    block_tables_ptr,
    table_stride,
    scale,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one split of a row's keys, with the query heads of one KV head.

    The grid is static: splits past the row's end return at once.
    """
    index, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(decode_rows_ptr + index).to(tl.int64)
    context = tl.load(context_lens_ptr + row)
    begin = split * SPLIT
    if begin >= context:
        return
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    d_mask = offs_d < HEAD_DIM
    q_mask = (offs_m < GROUP)[:, None] & d_mask[None, :]
    head = kv_head * GROUP + offs_m
    token = tl.load(cu_seqlens_q_ptr + row).to(tl.int64)
    at = (token * (NUM_KV_HEADS * GROUP) + head) * HEAD_DIM
    q = tl.load(q_ptr + at[:, None] + offs_d[None, :], mask=q_mask, other=0.0)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum(context, begin + SPLIT)
    for at_key in range(begin, end, BLOCK_N):
        keys = at_key + tl.arange(0, BLOCK_N)
        key_mask = keys < end
        block = tl.load(
            block_tables_ptr + row * table_stride + keys // CACHE_BLOCK, mask=key_mask, other=0
        ).to(tl.int64)
        line = (block * NUM_KV_HEADS + kv_head) * CACHE_BLOCK + keys % CACHE_BLOCK
        kv_at = line[:, None] * HEAD_DIM + offs_d[None, :]
        kv_mask = key_mask[:, None] & d_mask[None, :]
        k = tl.load(k_cache_ptr + kv_at, mask=kv_mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
        scores = tl.where(key_mask[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        top = new_top
        v = tl.load(v_cache_ptr + kv_at, mask=kv_mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    to = (index * (NUM_KV_HEADS * GROUP) + head) * tl.num_programs(2) + split
    m_mask = offs_m < GROUP
    tl.store(lse_ptr + to, top + tl.log2(total), mask=m_mask)
    part = partial_ptr + to[:, None].to(tl.int64) * HEAD_DIM + offs_d[None, :]
    tl.store(part, acc / total[:, None], mask=q_mask)


@triton.jit
def _join_splits_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    decode_rows_ptr,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program: one head of a row, its splits weighted by their sums."""
    index, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(decode_rows_ptr + index)
    used = tl.cdiv(tl.load(context_lens_ptr + row), SPLIT)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < HEAD_DIM
    at = (index * NUM_HEADS + head).to(tl.int64) * num_splits
    top = tl.load(lse_ptr + at)
    total = 1.0
    acc = tl.load(partial_ptr + at * HEAD_DIM + offs, mask=mask, other=0.0)
    for split in range(1, used):
        lse = tl.load(lse_ptr + at + split)
        part = tl.load(partial_ptr + (at + split) * HEAD_DIM + offs, mask=mask, other=0.0)
        new_top = tl.maximum(top, lse)
        fade, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        acc = acc * fade + part * weight
        total = total * fade + weight
        top = new_top
    token = tl.load(cu_seqlens_q_ptr + row).to(tl.int64)
    out = out_ptr + (token * NUM_HEADS + head) * HEAD_DIM + offs
    tl.store(out, (acc / total).to(out_ptr.dtype.element_ty), mask=mask)


def decode_settings(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> dict[str, int | str]:
    """Compile-time settings of the decode kernel."""
    chosen = paged_settings(num_heads, num_kv_heads, head_dim, block_size, dtype)
    block_m = max(16, triton.next_power_of_2(num_heads // num_kv_heads))
    return {
        **chosen,
        "BLOCK_M": block_m,
        "BLOCK_N": 64 if dtype.itemsize == 2 else 32,
        "SPLIT": SPLIT_SIZE,
        "num_warps": 4,
        "num_stages": 2,
    }


def join_settings(num_heads: int, head_dim: int) -> dict[str, int]:
    """Compile-time settings of the joining kernel."""
    block = triton.next_power_of_2(head_dim)
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block,
        "SPLIT": SPLIT_SIZE,
        "num_warps": 1,
    }


def launch_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    out: torch.Tensor,
    chosen: dict[str, int | str],
) -> None:
    count, heads, head_dim = len(batch.decode_rows), q.shape[1], q.shape[2]
    splits = triton.cdiv(batch.block_tables.shape[1] * k_cache.shape[2], SPLIT_SIZE)
    partial = torch.empty((count, heads, splits, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((count, heads, splits), dtype=torch.float32, device=q.device)
    _paged_decode_kernel[(count, k_cache.shape[1], splits)](
        q,
        k_cache,
        v_cache,
        partial,
        lse,
        batch.decode_rows,
        batch.cu_seqlens_q,
        batch.context_lens,
        batch.block_tables,
        batch.block_tables.stride(0),
        scale * LOG2_E,
        **chosen,
    )
    _join_splits_kernel[(count, heads)](
        partial,
        lse,
        out,
        batch.decode_rows,
        batch.cu_seqlens_q,
        batch.context_lens,
        splits,
        **join_settings(heads, head_dim),
    )
