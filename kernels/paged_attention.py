"""Causal attention over the paged KV cache, for steps that mix chunks of prompts with decoding.

Query heads that share a KV head, and for chunks several query tokens, are packed into one tile, so
that one load of a key serves them all. Rows that compute one token (decoding) are cut over their
keys into splits of a fixed size, so that the order of additions, and with it the result, does not
depend on what else is in the batch; a second kernel joins the splits.
Sources: FlashAttention-2 and Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .device import uses_triton
from .kv_cache import gather_kv

ArrayLike = Any  # lists or numpy arrays of whole numbers
LOG2_E = 1.4426950408889634
SPLIT_SIZE = 256  # keys of one split


@dataclass(frozen=True)
class AttentionBatch:
    """Where a step's tokens lie: what every layer's attention shares. Tensors are on the device.

    Row i has query tokens [cu_seqlens_q[i], cu_seqlens_q[i + 1]), the last of the
    context_lens[i] tokens that its blocks hold once this step's are written.
    """

    num_scheduled_tokens: tuple[int, ...]  # [r] on the host
    host_context_lens: tuple[int, ...]  # [r]
    cu_seqlens_q: torch.Tensor  # int32 [r + 1]
    context_lens: torch.Tensor  # int32 [r]
    block_tables: torch.Tensor  # int32 [r, blocks]
    slot_mapping: torch.Tensor  # int64 [n]
    decode_rows: torch.Tensor  # int32: rows that compute one token
    chunk_rows: tuple[int, ...]  # the other rows, on the host

    @classmethod
    def from_lists(
        cls,
        num_scheduled_tokens: ArrayLike,
        context_lens: ArrayLike,
        block_tables: ArrayLike,
        block_size: int,
        device: torch.device,
    ) -> AttentionBatch:
        """From counts [r], lengths [r] and tables [r, blocks] padded with any block; lists or
        arrays."""
        counts = torch.tensor(num_scheduled_tokens, dtype=torch.int64)
        lens = torch.tensor(context_lens, dtype=torch.int64)
        tables = torch.tensor(block_tables, dtype=torch.int32).reshape(len(counts), -1)
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        places = torch.arange(int(bounds[-1])) - bounds[rows] + (lens - counts)[rows]
        blocks = tables[rows, places // block_size].long()
        decode = (counts == 1).nonzero().flatten()
        return cls(
            num_scheduled_tokens=tuple(counts.tolist()),
            host_context_lens=tuple(lens.tolist()),
            cu_seqlens_q=bounds.int().to(device),
            context_lens=lens.int().to(device),
            block_tables=tables.to(device),
            slot_mapping=(blocks * block_size + places % block_size).to(device),
            decode_rows=decode.int().to(device),
            chunk_rows=tuple((counts != 1).nonzero().flatten().tolist()),
        )


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


def chunk_settings(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> dict[str, int | str]:
    """Compile-time settings of the chunk kernel. float32, which serves comparisons, takes half the
    tile; it still spills on sm_90 and sm_100."""
    tokens = 128 if dtype.itemsize == 2 else 64
    chosen = _common_settings(num_heads, num_kv_heads, head_dim, block_size, dtype)
    return {
        **chosen,
        "BLOCK_M": max(tokens, triton.next_power_of_2(num_heads // num_kv_heads)),
        "BLOCK_N": 64 if dtype.itemsize == 2 else 32,
        "num_warps": 8,
        "num_stages": 2,
    }


def decode_settings(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> dict[str, int | str]:
    """Compile-time settings of the decode kernel."""
    chosen = _common_settings(num_heads, num_kv_heads, head_dim, block_size, dtype)
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


def _common_settings(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> dict[str, int | str]:
    return {
        "GROUP": num_heads // num_kv_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "CACHE_BLOCK": block_size,
        "PRECISION": "tf32" if dtype.itemsize == 2 else "ieee",
    }


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
) -> torch.Tensor:
    """Attention of turned queries [n, heads, d] over their rows' blocks; returns [n, heads, d].

    This step's keys and values are in the cache already (`mrope_write_kv`).
    """
    if not uses_triton(q):
        return _paged_attention_cpu(q, k_cache, v_cache, batch, scale)
    q = q.contiguous()
    out = torch.empty_like(q)
    shape = (q.shape[1], k_cache.shape[1], q.shape[2], k_cache.shape[2], q.dtype)
    if batch.chunk_rows:
        _launch_chunks(q, k_cache, v_cache, batch, scale, out, chunk_settings(*shape))
    if batch.decode_rows.numel():
        _launch_decode(q, k_cache, v_cache, batch, scale, out, decode_settings(*shape))
    return out


def _launch_chunks(
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


def _launch_decode(
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


def _paged_attention_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
) -> torch.Tensor:
    """Row by row over torch's attention; the heads of a KV head are rows of one product."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    kv_heads = k_cache.shape[1]
    attend = torch.nn.functional.scaled_dot_product_attention
    start = 0
    for row, count in enumerate(batch.num_scheduled_tokens):
        length = batch.host_context_lens[row]
        table = batch.block_tables[row]
        k, v = (gather_kv(cache, table, length) for cache in (k_cache, v_cache))
        queries = q[start : start + count].unflatten(1, (kv_heads, -1))  # [m, kv, group, d]
        if count == 1:
            made = attend(queries, k[None], v[None], scale=scale)
        else:
            group = queries.shape[2]
            k, v = (x[:, None].expand(-1, group, -1, -1) for x in (k, v))
            mask = None
            if length > count:
                mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
            queries = queries.permute(1, 2, 0, 3)
            made = attend(queries, k, v, mask, is_causal=mask is None, scale=scale)
            made = made.permute(2, 0, 1, 3)
        out[start : start + count] = made.flatten(1, 2)
        start += count
    return out


def paged_attention_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
) -> torch.Tensor:
    """Written out token by token, in float32."""
    group = q.shape[1] // k_cache.shape[1]
    out: list[torch.Tensor] = []
    for row, count in enumerate(batch.num_scheduled_tokens):
        length = batch.host_context_lens[row]
        table = batch.block_tables[row].long()
        k, v = (gather_kv(c, table, length).float() for c in (k_cache, v_cache))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        for i in range(count):
            seen = length - count + i + 1
            query = q[len(out)].float()
            weights = torch.einsum("hd,hkd->hk", query, k[:, :seen]).mul(scale).softmax(-1)
            out.append(torch.einsum("hk,hkd->hd", weights, v[:, :seen]))
    return torch.stack(out).to(q.dtype)
