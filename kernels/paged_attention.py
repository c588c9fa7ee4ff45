"""Causal attention over the paged KV cache, for batches that mix prompt chunks and decoding.

This module dispatches by device and holds the reference. The kernels are in `paged_chunk.py` and
`paged_decode.py`.
"""

from __future__ import annotations

import torch

from .attention_batch import AttentionBatch
from .device import uses_triton
from .kv_cache import Cache, Fp8Cache, gather_kv
from .paged_attention_cpu import paged_attention_cpu
from .paged_chunk import paged_chunks
from .paged_decode import paged_decode


def paged_attention(
    q: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    batch: AttentionBatch,
    scale: float,
) -> torch.Tensor:
    """Compute causal attention of each row's queries over its cached tokens.

    Args:
        q: Rotated queries [n, heads, d].
        k_cache, v_cache: [num_blocks, kv_heads, block_size, d], in q's dtype or e4m3. They contain
            this step's keys and values already (`mrope_write_kv`).
        batch: Attention metadata of the step.
        scale: Factor of the scores, usually d ** -0.5.

    Returns [n, heads, d] in q's dtype.
    """
    if not uses_triton(q):
        if isinstance(k_cache, Fp8Cache) or isinstance(v_cache, Fp8Cache):  # tests only
            return paged_attention_ref(q, k_cache, v_cache, batch, scale)
        return paged_attention_cpu(q, k_cache, v_cache, batch, scale)
    q = q.contiguous()
    out = torch.empty_like(q)
    if batch.chunk_rows:
        paged_chunks(q, k_cache, v_cache, batch, scale, out)
    if batch.decode_rows.numel():
        paged_decode(q, k_cache, v_cache, batch, scale, out)
    return out


def paged_attention_ref(
    q: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    batch: AttentionBatch,
    scale: float,
) -> torch.Tensor:
    """Compute `paged_attention` token by token in float32 (test oracle).

    Takes the same arguments; returns [n, heads, d] in q's dtype.
    """
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
