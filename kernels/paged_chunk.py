"""Attention of prompts and prompt chunks over the paged KV cache.

A tile packs several query tokens with all query heads of one KV head, so that each key is loaded
once for all of them. Source: FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_batch import AttentionBatch
from .kv_cache import Cache, Fp8Cache, kernel_arguments
from .launch import FEW_PROGRAMS, architecture, launch, paged_settings
from .online_softmax import LOG2_E
from .paged_tile import attend_cache
from .tiles import chunk_splits, count_tiles, cut_chunks

LOWEST = tl.constexpr(-1e30)
SPLIT_STEP = tl.constexpr(128)  # keys; a multiple of every tile size


@triton.jit
def _paged_chunk_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    block_tables_ptr,
    tiles_ptr,
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
    SPLIT: tl.constexpr,
    FP8: tl.constexpr,
):
    """Attend BLOCK_M // GROUP query tokens of a row, for one KV head per program.

    If SPLIT, a program covers one split of the keys, and `_join_chunks_kernel` combines them.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tiles_ptr + tile * 4)
    start = tl.load(tiles_ptr + tile * 4 + 1)
    first = tl.load(cu_seqlens_q_ptr + row)
    length = tl.load(cu_seqlens_q_ptr + row + 1) - first
    context = tl.load(context_lens_ptr + row)
    TOKENS: tl.constexpr = BLOCK_M // GROUP

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    token = start + offs_m // GROUP
    valid = (offs_m < TOKENS * GROUP) & (token < length)
    pos = context - length + token  # in the request
    head = kv_head * GROUP + offs_m % GROUP
    at = ((first + token) * (NUM_KV_HEADS * GROUP) + head).to(tl.int64) * HEAD_DIM
    d_mask = offs_d < HEAD_DIM
    q_mask = valid[:, None] & d_mask[None, :]
    q = tl.load(q_ptr + at[:, None] + offs_d[None, :], mask=q_mask, other=0.0)
    table_ptr = block_tables_ptr + row.to(tl.int64) * table_stride
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)  # finite: a split may have no key for a query
    first_pos = context - length + start
    last = tl.minimum(context, first_pos + TOKENS)
    seen_by_all = (first_pos + 1) // BLOCK_N * BLOCK_N
    begin, end = 0, last
    if SPLIT:
        split = tl.load(tiles_ptr + tile * 4 + 2)
        splits = tl.load(tiles_ptr + tile * 4 + 3)
        keys = tl.cdiv(last, splits * SPLIT_STEP) * SPLIT_STEP
        begin = tl.minimum(split * keys, last)
        end = tl.minimum(begin + keys, last)
        seen_by_all = tl.maximum(begin, tl.minimum(seen_by_all, end))
    acc, top, total = attend_cache(
        q, top, pos, begin, seen_by_all, end, kv_head, k_cache_ptr, v_cache_ptr, k_scale_ptr,
        v_scale_ptr, table_ptr, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_N, CACHE_BLOCK,
        PRECISION, FP8,
    )  # fmt: skip
    acc = (
        acc / tl.maximum(total, 1.0)[:, None]
    )  # the largest weight is 1, so max() only affects empty rows
    if SPLIT:
        line = (tile * NUM_KV_HEADS + kv_head).to(tl.int64) * BLOCK_M + offs_m
        tl.store(lse_ptr + line, tl.where(total > 0, top + tl.log2(total), float("-inf")))
        to = partial_ptr + line[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(to, acc, mask=q_mask)
    else:
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] + offs_d[None, :], out, mask=q_mask)


@triton.jit
def _join_chunks_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    cu_seqlens_q_ptr,
    joins_ptr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Combine the splits of one tile and KV head per program, weighted by their sums."""
    joins_ptr += tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    row = tl.load(joins_ptr)
    start = tl.load(joins_ptr + 1)
    splits = tl.load(joins_ptr + 2)
    part = tl.load(joins_ptr + 3)
    first = tl.load(cu_seqlens_q_ptr + row)
    length = tl.load(cu_seqlens_q_ptr + row + 1) - first
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    token = start + offs_m // GROUP
    valid = (offs_m < TOKENS * GROUP) & (token < length)
    mask = valid[:, None] & (offs_d < HEAD_DIM)[None, :]
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(splits):
        line = ((part + split) * NUM_KV_HEADS + kv_head).to(tl.int64) * BLOCK_M + offs_m
        lse = tl.load(lse_ptr + line)
        at = partial_ptr + line[:, None] * HEAD_DIM + offs_d[None, :]
        new_top = tl.maximum(top, lse)
        fade, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        acc = acc * fade[:, None] + tl.load(at, mask=mask, other=0.0) * weight[:, None]
        total = total * fade + weight
        top = new_top
    head = kv_head * GROUP + offs_m % GROUP
    to = ((first + token) * (NUM_KV_HEADS * GROUP) + head).to(tl.int64) * HEAD_DIM
    out = (acc / tl.maximum(total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + to[:, None] + offs_d[None, :], out, mask=mask)


def chunk_settings(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    arch: str,
    lengths: tuple[int, ...],
    split: bool = False,
    fp8: bool = False,
) -> dict[str, int | str]:
    """Return compile-time settings for chunks of these lengths.

    Tiles are smaller if there are few programs, or if `split`. `fp8`: the cache holds e4m3.
    """
    group = num_heads // num_kv_heads
    found = launch("chunk_fp8" if fp8 else "chunk", arch, dtype, group)
    few = count_tiles(lengths, found.block_m // group) * num_kv_heads < FEW_PROGRAMS
    if split or few:
        found = launch("chunk_small", arch, dtype, group)
    shape = paged_settings(num_heads, num_kv_heads, head_dim, block_size, dtype, fp8)
    return {**shape, **found.settings(), "SPLIT": split}


def join_settings(chunk: dict[str, int | str]) -> dict[str, int | str]:
    """Return compile-time settings of the join kernel for those of the chunk kernel."""
    names = ("GROUP", "NUM_KV_HEADS", "HEAD_DIM", "BLOCK_D", "BLOCK_M")
    return {name: chunk[name] for name in names} | {"num_warps": 8}


def paged_chunks(
    q: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    batch: AttentionBatch,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write the attention of the batch's chunk rows to `out`.

    Arguments are those of `paged_attention`; `out` is [n, heads, d]. Rows whose keys are processed
    whole run first, then those with split keys.
    """
    kv_heads = k_cache.shape[1]
    shape = (q.shape[1] // kv_heads, kv_heads)
    counts = [0 if count == 1 else count for count in batch.num_scheduled_tokens]
    rows = list(zip(counts, batch.host_context_lens, strict=True))
    splits = tuple(chunk_splits(count, context, *shape) for count, context in rows)
    for split in (False, True):
        taken = zip(counts, splits, strict=True)
        lengths = tuple(count if (number > 1) == split else 0 for count, number in taken)
        if any(lengths):
            _launch(q, k_cache, v_cache, batch, scale, out, lengths, splits, split)


def _launch(
    q: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    batch: AttentionBatch,
    scale: float,
    out: torch.Tensor,
    lengths: tuple[int, ...],
    splits: tuple[int, ...],
    split: bool,
) -> None:
    """Run the rows whose length is not 0."""
    heads, head_dim, kv_heads = q.shape[1], q.shape[2], k_cache.shape[1]
    shape = (heads, kv_heads, head_dim, k_cache.shape[2], q.dtype)
    fp8 = isinstance(k_cache, Fp8Cache)
    chosen = chunk_settings(*shape, architecture(q.device), lengths, split, fp8)
    block_m = int(chosen["BLOCK_M"])
    cut = cut_chunks(lengths, splits, block_m // (heads // kv_heads), q.device)
    lines = len(cut.tiles) * kv_heads * block_m if split else 0
    partial = torch.empty(lines, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(lines, dtype=torch.float32, device=q.device)
    _paged_chunk_kernel[(len(cut.tiles), kv_heads)](
        q,
        *kernel_arguments(k_cache, v_cache, torch.int16),
        out,
        partial,
        lse,
        batch.cu_seqlens_q,
        batch.context_lens,
        batch.block_tables,
        cut.tiles,
        batch.block_tables.stride(0),
        scale * LOG2_E,
        **chosen,
    )
    if split:
        _join_chunks_kernel[(len(cut.joins), kv_heads)](
            partial, lse, out, batch.cu_seqlens_q, cut.joins, **join_settings(chosen)
        )
