"""Causal attention over the paged KV cache on a CPU.

The compiled kernel reads blocks in place. Without it, each row's blocks are gathered for torch's
attention.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from . import native
from .attention_batch import AttentionBatch
from .kv_cache import gather_kv

LOG2_E = 1.4426950408889634
SPLIT_SIZE = 512  # keys per part of a decode row: fixed, for batch invariance


@dataclass(frozen=True)
class Plan:
    """Distribution of a step's attention over threads; shared by all layers."""

    tiles: torch.Tensor  # int32 [t, 6] of chunks: `Tile` of native/attention.c
    parts: torch.Tensor  # int32 [p, 5] of decode rows: `Part` of native/decode.c
    joins: torch.Tensor  # int32 [j, 3]: token, first part, number of parts
    num_joined: int  # parts that need joining


@functools.lru_cache(maxsize=1)
def plan_attention(batch: AttentionBatch, group: int, kv_heads: int) -> Plan:
    """Split chunks into tiles (some tokens, one KV head) and decode rows into parts.

    The longest come first, to balance the threads.
    """
    tiles: list[tuple[int, ...]] = []
    parts: list[tuple[int, ...]] = []
    joins: list[tuple[int, ...]] = []
    size = native.TILE_ROWS // group
    token = num_joined = 0
    for row, count in enumerate(batch.num_scheduled_tokens):
        context = batch.host_context_lens[row]
        if count == 1:
            starts = range(0, context, SPLIT_SIZE)
            first = num_joined if len(starts) > 1 else -1
            for i, at in enumerate(starts):
                part = -1 if first < 0 else first + i
                parts.append((row, token, at, min(at + SPLIT_SIZE, context), part))
            if first >= 0:
                joins.append((token, first, len(starts)))
                num_joined += len(starts)
        for at in range(0, count if count > 1 else 0, size):
            some = min(size, count - at)
            seen = context - count + at + 1
            tiles += [(row, token + at, some, h, seen + some - 1, seen) for h in range(kv_heads)]
        token += count
    tiles.sort(key=lambda t: t[2] * t[4], reverse=True)
    parts.sort(key=lambda p: p[3] - p[2], reverse=True)
    return Plan(
        torch.tensor(tiles, dtype=torch.int32).reshape(-1, 6),
        torch.tensor(parts, dtype=torch.int32).reshape(-1, 5),
        torch.tensor(joins, dtype=torch.int32).reshape(-1, 3),
        num_joined,
    )


def reads_in_place(k_cache: torch.Tensor, group: int) -> bool:
    """Return whether the compiled kernel supports this cache, with `group` queries per KV head."""
    return native.serves_heads(k_cache) and group <= native.TILE_ROWS


def paged_attention_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
) -> torch.Tensor:
    """Compute `paged_attention` of q [n, heads, d] on a CPU; returns [n, heads, d].

    k_cache, v_cache: [num_blocks, kv_heads, block_size, d].
    """
    in_place = q.dtype == k_cache.dtype and reads_in_place(k_cache, q.shape[1] // k_cache.shape[1])
    if in_place:  # for every batch, so that results are batch-invariant
        return _in_place(q.contiguous(), k_cache, v_cache, batch, scale)
    return _gathered(q, k_cache, v_cache, batch, scale)


def _in_place(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
) -> torch.Tensor:
    heads, head_dim = q.shape[1:]
    kv_heads, block_size = k_cache.shape[1:3]
    plan = plan_attention(batch, heads // kv_heads, kv_heads)
    out = torch.empty_like(q)
    tables = batch.block_tables
    where = (q, out, k_cache, v_cache, tables, tables.stride(0))
    sizes = (heads, kv_heads, head_dim, block_size, scale * LOG2_E)
    if len(plan.tiles):
        native.call("octavo_paged_attention", *where, plan.tiles, len(plan.tiles), *sizes)
    if len(plan.parts):
        partial = torch.empty(plan.num_joined, heads, head_dim, dtype=torch.float32)
        lse = torch.empty(plan.num_joined, heads, dtype=torch.float32)
        parts = (plan.parts, len(plan.parts))
        native.call("octavo_decode_attention", *where, *parts, *sizes, partial, lse)
        if len(plan.joins):
            joins = (plan.joins, len(plan.joins))
            native.call("octavo_join_parts", out, partial, lse, *joins, heads, head_dim)
    return out


def _gathered(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
) -> torch.Tensor:
    """Run torch's attention row by row; the query heads of a KV head are batched."""
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
