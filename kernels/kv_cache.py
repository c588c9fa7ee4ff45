"""The paged KV cache, K and V apart, each [num_blocks, kv_heads, block_size, head_dim].

A slot is a token's place: block × block_size + offset. Slot -1 is no place: nothing is written.
Triton kernels address the cache themselves (`mrope.py`, `paged_chunk.py`, `paged_decode.py`); these
are the plain forms that CPU paths and oracles share.
"""

from __future__ import annotations

import torch


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes keys and values [n, kv_heads, head_dim] to their slots int64 [n]."""
    block_size = k_cache.shape[2]
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v


def copy_blocks(cache: torch.Tensor, copies: torch.Tensor) -> None:
    """Copies whole blocks, int64 [2, c] from and to; all are read before any is written."""
    cache[copies[1]] = cache[copies[0]]


def gather_kv(cache: torch.Tensor, block_table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of tables [..., blocks] -> [..., kv_heads, length, head_dim]."""
    block_size = cache.shape[2]
    blocks = cache[block_table[..., : -(-length // block_size)]]  # [..., blocks, heads, size, d]
    return blocks.movedim(-4, -3).flatten(-3, -2)[..., :length, :]
