"""Launch settings that several kernels share."""

from __future__ import annotations

import torch
import triton

LOG2_E = 1.4426950408889634


def paged_settings(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> dict[str, int | str]:
    """Compile-time settings of the kernels over the paged cache."""
    return {
        "GROUP": num_heads // num_kv_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "CACHE_BLOCK": block_size,
        "PRECISION": "tf32" if dtype.itemsize == 2 else "ieee",
    }
