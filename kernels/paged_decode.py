"""Attention of rows that compute one token, over the paged KV cache.

A tile packs the query heads of one KV head. Keys are split in parts of a fixed size, so that the
summation order, and with it the result, does not depend on the rest of the batch; a second kernel
combines the splits. Source: Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_batch import AttentionBatch
from .kv_cache import Cache, Fp8Cache, kernel_arguments
from .launch import architecture, launch, paged_settings
from .online_softmax import LOG2_E
from .paged_tile import attend_cache

SPLIT_SIZE = 256  # keys per split; a multiple of it for long rows
MAX_SPLITS = 64  # per row: bounds the grid and the join kernel's tile


@triton.jit
def split_size(context, SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Return the keys per split. Depends on the row's length only, for batch invariance."""
    return SPLIT * tl.maximum(1, tl.cdiv(context, SPLIT * MAX_SPLITS))


@triton.jit
def _paged_decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
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
    MAX_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8: tl.constexpr,
):
    """Attend one split of a row's keys, for one KV head per program.

    The grid is static: programs of splits past the row's end return immediately.
    """
    index, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(decode_rows_ptr + index).to(tl.int64)
    context = tl.load(context_lens_ptr + row)
    size = split_size(context, SPLIT, MAX_SPLITS)
    begin = split * size
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
    table_ptr = block_tables_ptr + row * table_stride
    pos = tl.full((BLOCK_M,), context - 1, tl.int32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    end = tl.minimum(context, begin + size)
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    acc, top, total = attend_cache(
        q, top, pos, begin, whole, end, kv_head, k_cache_ptr, v_cache_ptr, k_scale_ptr,
        v_scale_ptr, table_ptr, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_N, CACHE_BLOCK,
        PRECISION, FP8,
    )  # fmt: skip
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
    MAX_SPLITS: tl.constexpr,
):
    """Combine all splits of one head of a row per program, weighted by their sums.

    Padding rows have no keys and get zeros.
    """
    index, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(decode_rows_ptr + index)
    context = tl.load(context_lens_ptr + row)
    used = tl.cdiv(context, split_size(context, SPLIT, MAX_SPLITS))
    splits = tl.arange(0, MAX_SPLITS)
    offs_d = tl.arange(0, BLOCK_D)
    there = splits < used
    at = (index * NUM_HEADS + head).to(tl.int64) * num_splits + splits
    lse = tl.load(lse_ptr + at, mask=there, other=float("-inf"))
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, 0), -1e30))
    mask = there[:, None] & (offs_d < HEAD_DIM)[None, :]
    parts = tl.load(partial_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
    total = tl.maximum(tl.sum(weights, 0), 1.0)  # the largest weight is 1
    out = tl.sum(parts * weights[:, None], 0) / total
    token = tl.load(cu_seqlens_q_ptr + row).to(tl.int64)
    to = out_ptr + (token * NUM_HEADS + head) * HEAD_DIM + offs_d
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


def decode_settings(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    arch: str,
    fp8: bool = False,
) -> dict[str, int | str]:
    """Return compile-time settings of the decode kernel. `fp8`: the cache holds e4m3."""
    return {
        **paged_settings(num_heads, num_kv_heads, head_dim, block_size, dtype, fp8),
        **launch("decode", arch, dtype, num_heads // num_kv_heads).settings(),
        "SPLIT": SPLIT_SIZE,
        "MAX_SPLITS": MAX_SPLITS,
    }


def join_settings(num_heads: int, head_dim: int) -> dict[str, int]:
    """Return compile-time settings of the join kernel."""
    block = triton.next_power_of_2(head_dim)
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block,
        "SPLIT": SPLIT_SIZE,
        "MAX_SPLITS": MAX_SPLITS,
        "num_warps": 4,
    }


def num_splits(table_width: int, block_size: int) -> int:
    """Return the splits per row in the grid: the number that a full block table needs.

    It does not depend on the rows' lengths, so one captured CUDA graph serves all batches.
    """
    return min(MAX_SPLITS, triton.cdiv(table_width * block_size, SPLIT_SIZE))


def paged_decode(
    q: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    batch: AttentionBatch,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write the attention of the batch's decode rows to `out`.

    Arguments are those of `paged_attention`; `out` is [n, heads, d].
    """
    count, heads, head_dim = len(batch.decode_rows), q.shape[1], q.shape[2]
    kv_heads, block_size = k_cache.shape[1:3]
    splits = num_splits(batch.block_tables.shape[1], block_size)
    partial = torch.empty((count, heads, splits, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((count, heads, splits), dtype=torch.float32, device=q.device)
    arch, fp8 = architecture(q.device), isinstance(k_cache, Fp8Cache)
    _paged_decode_kernel[(count, kv_heads, splits)](
        q,
        *kernel_arguments(k_cache, v_cache, torch.int16),
        partial,
        lse,
        batch.decode_rows,
        batch.cu_seqlens_q,
        batch.context_lens,
        batch.block_tables,
        batch.block_tables.stride(0),
        scale * LOG2_E,
        **decode_settings(heads, kv_heads, head_dim, block_size, q.dtype, arch, fp8),
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
