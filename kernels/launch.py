"""Launch settings of attention and quantized products, by kernel and architecture.

There is no autotuning at startup. The rows were derived from compiler output
(`octavo bench kernels --paper`) and are not timed on hardware. Criteria: no spills; 16-byte
asynchronous copies of keys and values; wgmma on sm_90 for chunks and vision, which needs 64 queries
per four warps. With three stages the block table is fetched one tile ahead of its keys. BLOCK_M and
BLOCK_N hold for head sizes up to 128 and any number of query heads per KV head. For matrix
products they count tokens and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

FEW_PROGRAMS = 128  # about one per SM: an H100 has 132, an A100 108


@dataclass(frozen=True)
class Launch:
    """Tile size (queries × keys, or tokens × outputs), warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def settings(self) -> dict[str, int | str]:
        """Return the settings as keyword arguments of a Triton launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Kernel -> architecture -> launch, for 16-bit dtypes. "chunk_small" is for grids of few programs.
# A decode tile has the query heads of one KV head, padded to 16. It uses HMMA, since wgmma needs
# 64 rows. "other" fits in 48 KB of shared memory.
TABLE: dict[str, dict[str, Launch]] = {
    "chunk": {
        "sm_80": Launch(128, 64, 8, 3),
        "sm_90": Launch(128, 64, 8, 3),
        "sm_100": Launch(128, 64, 8, 3),
        "gfx942": Launch(128, 32, 8, 2),
        "other": Launch(64, 32, 4, 3),
    },
    "chunk_fp8": {  # e4m3 cache; sm_80 would spill with 64 keys
        "sm_80": Launch(128, 32, 8, 3),
        "sm_90": Launch(128, 64, 8, 3),
        "sm_100": Launch(128, 64, 8, 3),
        "gfx942": Launch(128, 32, 8, 2),
        "other": Launch(64, 32, 4, 3),
    },
    "chunk_small": {
        "sm_80": Launch(64, 64, 8, 3),
        "sm_90": Launch(64, 64, 4, 3),
        "sm_100": Launch(64, 64, 4, 3),
        "gfx942": Launch(64, 64, 4, 1),
        "other": Launch(64, 32, 4, 3),
    },
    "decode": {
        "sm_80": Launch(16, 64, 4, 3),
        "sm_90": Launch(16, 64, 4, 3),
        "sm_100": Launch(16, 64, 4, 3),
        "gfx942": Launch(16, 64, 4, 2),
        "other": Launch(16, 64, 4, 3),
    },
    "vision": {
        "sm_80": Launch(64, 64, 4, 3),
        "sm_90": Launch(128, 128, 8, 2),
        "sm_100": Launch(128, 64, 4, 2),
        "gfx942": Launch(128, 64, 4, 2),
        "other": Launch(64, 64, 4, 2),
    },
}
# float32 is for tests only: one entry for all architectures, small enough not to spill.
FLOAT32 = {
    "chunk": Launch(32, 16, 8, 2),
    "chunk_fp8": Launch(16, 16, 8, 2),
    "chunk_small": Launch(16, 16, 8, 2),
    "decode": Launch(16, 16, 8, 2),
    "vision": Launch(32, 32, 4, 2),
}


def _sizes(*launches: Launch) -> dict[str, Launch]:
    return dict(zip(LINEAR_SIZES, launches, strict=True))


# Products with 4-bit and e4m3 weights -> architecture -> size -> launch. The first of few, some and
# more that holds all tokens is used; for more tokens, the largest size that uses all SMs. Outputs
# are the M dimension of wgmma and tcgen05, which is at least 64, so that a tile may have 16 tokens.
LINEAR_SIZES = ("few", "some", "more", "many", "wide")
LINEARS: dict[str, dict[str, dict[str, Launch]]] = {
    "int4": {
        "sm_80": _sizes(
            Launch(16, 64, 4, 4),
            Launch(32, 128, 8, 2),
            Launch(64, 64, 8, 3),
            Launch(64, 128, 8, 2),
            Launch(64, 128, 8, 2),
        ),
        "sm_90": _sizes(
            Launch(16, 64, 4, 4),
            Launch(32, 64, 4, 3),
            Launch(64, 64, 4, 2),
            Launch(64, 128, 8, 2),
            Launch(128, 256, 8, 2),
        ),
        "sm_100": _sizes(
            Launch(16, 64, 4, 4),
            Launch(32, 64, 4, 3),
            Launch(64, 64, 8, 3),
            Launch(64, 128, 8, 3),
            Launch(64, 128, 8, 3),
        ),
        "gfx942": _sizes(
            Launch(16, 64, 4, 2),
            Launch(32, 128, 8, 2),
            Launch(64, 64, 4, 2),
            Launch(64, 128, 8, 2),
            Launch(64, 128, 8, 2),
        ),
        "other": _sizes(
            Launch(16, 64, 4, 3),
            Launch(32, 128, 8, 2),
            Launch(32, 128, 8, 2),
            Launch(32, 128, 8, 2),
            Launch(32, 128, 8, 2),
        ),
    },
    "fp8": {
        "sm_90": _sizes(
            Launch(16, 64, 4, 4),
            Launch(32, 64, 4, 4),
            Launch(64, 64, 4, 4),
            Launch(64, 128, 8, 4),
            Launch(128, 256, 8, 3),
        ),
        "sm_100": _sizes(
            Launch(16, 64, 4, 4),
            Launch(32, 64, 4, 4),
            Launch(64, 64, 4, 4),
            Launch(64, 128, 8, 4),
            Launch(256, 128, 8, 3),
        ),
        "other": _sizes(
            Launch(16, 64, 4, 3),
            Launch(32, 64, 4, 3),
            Launch(64, 64, 4, 3),
            Launch(64, 64, 4, 3),
            Launch(64, 64, 4, 3),
        ),
    },
}
CAPABILITIES = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


@lru_cache
def architecture(device: torch.device) -> str:
    """Return the device's key in the tables. Triton's CPU interpreter uses sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.startswith("gfx942") else "other"
    return CAPABILITIES.get(torch.cuda.get_device_capability(device), "other")


def launch(kernel: str, arch: str, dtype: torch.dtype, group: int = 1) -> Launch:
    """Return the table's entry, with tiles of at least `group` query heads (of one KV head)."""
    found = TABLE[kernel][arch] if dtype.itemsize == 2 else FLOAT32[kernel]
    block_m = max(found.block_m, triton.next_power_of_2(group))
    return Launch(block_m, found.block_n, found.num_warps, found.num_stages)


def paged_settings(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    fp8: bool = False,
) -> dict[str, int | str]:
    """Return the shape-dependent settings of the paged-attention kernels."""
    return {
        "GROUP": num_heads // num_kv_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "CACHE_BLOCK": block_size,
        "PRECISION": "tf32" if dtype.itemsize == 2 else "ieee",
        "FP8": fp8,
    }
