"""Attention of prompts and of their chunks over the paged cache.

Query heads that share a KV head and several query tokens are packed into one tile, so that one load
of a key serves them all. Source: FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_batch import AttentionBatch
from .launch import FEW_PROGRAMS, architecture, launch, paged_settings
from .online_softmax import LOG2_E
from .paged_tile import attend_keys
from .tiles import count_tiles, cut_tiles


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

    LINE: tl.constexpr = NUM_KV_HEADS * CACHE_BLOCK * HEAD_DIM
    k_cache_ptr += kv_head * CACHE_BLOCK * HEAD_DIM
    v_cache_ptr += kv_head * CACHE_BLOCK * HEAD_DIM
    table_ptr = block_tables_ptr + row.to(tl.int64) * table_stride
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first_place = context - length + start
    end = tl.minimum(context, first_place + TOKENS)
    seen_by_all = (first_place + 1) // BLOCK_N * BLOCK_N
    acc, top, total = attend_keys(
        q, acc, top, total, place, 0, seen_by_all, k_cache_ptr, v_cache_ptr, table_ptr, scale,
        LINE, HEAD_DIM, BLOCK_D, BLOCK_N, CACHE_BLOCK, PRECISION, False,
    )  # fmt: skip
    acc, top, total = attend_keys(
        q, acc, top, total, place, seen_by_all, end, k_cache_ptr, v_cache_ptr, table_ptr, scale,
        LINE, HEAD_DIM, BLOCK_D, BLOCK_N, CACHE_BLOCK, PRECISION, True,
    )  # fmt: skip
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] + offs_d[None, :], out, mask=q_mask)


def chunk_settings(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    arch: str,
    lengths: tuple[int, ...],
) -> dict[str, int | str]:
    """Compile-time settings for chunks of these lengths: smaller tiles where they are few."""
    group = num_heads // num_kv_heads
    found = launch("chunk", arch, dtype, group)
    if count_tiles(lengths, found.block_m // group) * num_kv_heads < FEW_PROGRAMS:
        found = launch("chunk_small", arch, dtype, group)
    shape = paged_settings(num_heads, num_kv_heads, head_dim, block_size, dtype)
    return {**shape, **found.settings()}


def paged_chunks(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Writes `out` [n, heads, d] at the tokens of the batch's chunk rows."""
    lengths = tuple(0 if count == 1 else count for count in batch.num_scheduled_tokens)
    shape = (q.shape[1], k_cache.shape[1], q.shape[2], k_cache.shape[2], q.dtype)
    chosen = chunk_settings(*shape, architecture(q.device), lengths)
    size = int(chosen["BLOCK_M"]) // int(chosen["GROUP"])
    rows, starts = cut_tiles(lengths, size, q.device)
    _paged_chunk_kernel[(len(rows), k_cache.shape[1])](
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
