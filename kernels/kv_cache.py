"""The paged KV cache: K and V, each [num_blocks, kv_heads, block_size, head_dim].

A token's slot is block × block_size + offset. Slot -1 means that nothing is written. Triton kernels
address the cache directly (`mrope.py`, `paged_chunk.py`, `paged_decode.py`); the functions here are
for CPU paths and references.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .fp8_linear import FP8, quantize_rows_fp8_ref


@dataclass(frozen=True, eq=False)
class Fp8Cache:
    """Keys or values in e4m3, with a scale per slot and KV head.

    The scale is set when the slot is written: no calibration, and tokens are independent.
    """

    numbers: torch.Tensor  # uint8 [num_blocks, kv_heads, block_size, head_dim]: e4m3 bits
    scales: torch.Tensor  # float32 [num_blocks, kv_heads, block_size]

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes


Cache = torch.Tensor | Fp8Cache  # K or V of one layer


def kernel_arguments(
    k_cache: Cache, v_cache: Cache, view: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return K, V, K scales and V scales for a Triton kernel.

    e4m3 caches are viewed as dtype `view`. For other caches, K and V stand in for the scales.
    """
    if isinstance(k_cache, Fp8Cache) and isinstance(v_cache, Fp8Cache):
        k, v = (cache.numbers.view(view) for cache in (k_cache, v_cache))
        return k, v, k_cache.scales, v_cache.scales
    assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
    return k_cache, v_cache, k_cache, v_cache


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    slot_mapping: torch.Tensor,
) -> None:
    """Write keys and values [n, kv_heads, head_dim] to their slots.

    slot_mapping: int64 [n]; -1 writes nothing.
    """
    block_size = k_cache.shape[2]
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    for cache, rows in ((k_cache, k), (v_cache, v)):
        if isinstance(cache, Fp8Cache):
            numbers, scales = quantize_rows_fp8_ref(rows.flatten(0, 1))
            cache.numbers[block, :, offset] = numbers.view(torch.uint8).view(rows.shape)
            cache.scales[block, :, offset] = scales.view(rows.shape[:2])
        else:
            cache[block, :, offset] = rows


def copy_blocks(cache: Cache, copies: torch.Tensor) -> None:
    """Copy whole blocks; `copies` is int64 [2, c], sources and targets. Reads before writing."""
    for part in (cache.numbers, cache.scales) if isinstance(cache, Fp8Cache) else (cache,):
        part[copies[1]] = part[copies[0]]


def gather_kv(cache: Cache, block_table: torch.Tensor, length: int) -> torch.Tensor:
    """Return the first `length` tokens of block tables [..., blocks].

    The result is [..., kv_heads, length, head_dim], in the cache's dtype or, for e4m3, float32.
    """
    table = block_table[..., : -(-length // cache.shape[2])]
    if isinstance(cache, Fp8Cache):
        blocks = cache.numbers[table].view(FP8).float() * cache.scales[table][..., None]
    else:
        blocks = cache[table]  # [..., blocks, heads, size, d]
    return blocks.movedim(-4, -3).flatten(-3, -2)[..., :length, :]
