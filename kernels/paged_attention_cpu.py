"""Causal attention over the paged KV cache on a CPU."""

from __future__ import annotations

import torch

from .attention_batch import AttentionBatch
from .kv_cache import gather_kv


def paged_attention_cpu(
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
