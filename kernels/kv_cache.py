"""The paged KV cache, K and V apart, each [num_blocks, kv_heads, block_size, head_dim].

A slot is a token's place: block × block_size + offset. Slot -1 is no place: nothing is written.
Triton kernels address the cache themselves (`mrope.py`, `paged_chunk.py`, `paged_decode.py`); these
are the plain forms that CPU paths and oracles share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .fp8_linear import FP8, quantize_rows_fp8_ref


@dataclass(frozen=True, eq=False)
class Fp8Cache:
    """Keys or values in e4m3. Each slot and KV head has a scale of its own, set where it is
    written: nothing is calibrated, and no token's numbers depend on another's."""

    numbers: torch.Tensor  # uint8 [num_blocks, kv_heads, block_size, head_dim], the bits of e4m3
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
    """K, V and their scales for a Triton kernel, e4m3 as `view`; what stands in for scales where
    there are none."""
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
    """Writes keys and values [n, kv_heads, head_dim] to their slots int64 [n]."""
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
    """Copies whole blocks, int64 [2, c] from and to; all are read before any is written."""
    for part in (cache.numbers, cache.scales) if isinstance(cache, Fp8Cache) else (cache,):
        part[copies[1]] = part[copies[0]]


def gather_kv(cache: Cache, block_table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of tables [..., blocks] -> [..., kv_heads, length, head_dim];
    float32 if they lie in e4m3."""
    table = block_table[..., : -(-length // cache.shape[2])]
    if isinstance(cache, Fp8Cache):
        blocks = cache.numbers[table].view(FP8).float() * cache.scales[table][..., None]
    else:
        blocks = cache[table]  # [..., blocks, heads, size, d]
    return blocks.movedim(-4, -3).flatten(-3, -2)[..., :length, :]
