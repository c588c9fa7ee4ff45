"""KV cache allocation, and memory requirements of a rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...kernels.fp8_linear import FP8
from ...kernels.kv_cache import Cache, Fp8Cache
from ..config.engine_config import ModelConfig
from ..model.decoder import LayerCache
from ..model.parallel import num_kv_heads_per_rank
from ..utils.machine_memory import available_memory

SCALE = torch.float32  # dtype of FP8 scales, one per token and KV head


@dataclass(frozen=True)
class MemoryReport:
    """Memory of a rank after loading, in bytes.

    On a CPU, total and free bytes are those of the machine, which the ranks share; on a GPU they
    are those of the rank's device.
    """

    weight_bytes: int
    total_bytes: int
    free_bytes: int
    kv_block_bytes: int  # K and V of one block in all layers on this rank
    dtype: str
    device: str


def kv_block_bytes(config: ModelConfig, size: int, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block, K and V of all layers, on each of `size` ranks.

    FP8 includes a scale per token and KV head.
    """
    per_head = config.head_dim * dtype.itemsize + (SCALE.itemsize if dtype == FP8 else 0)
    per_token = num_kv_heads_per_rank(config, size) * per_head
    return 2 * config.num_hidden_layers * block_size * per_token


def activation_bytes(
    config: ModelConfig, size: int, max_tokens: int, max_encode_tokens: int, dtype: torch.dtype
) -> int:
    """Return an upper bound of a step's memory in addition to weights and cache, in bytes.

    Encoding and decoding run one after the other, so the larger one counts. The decoder's peak is
    its MLP (gate, up and their product, with input and residual). The tower's is its MLP, or q, k
    and v of attention in float32 during rotation.
    """
    vision, item = config.vision, dtype.itemsize
    inner = -(-config.intermediate_size // size)
    decode = max_tokens * (3 * inner + 6 * config.hidden_size) * item
    patches = max_encode_tokens * vision.spatial_merge_size**2
    mlp = int(vision.embed_dim * vision.mlp_ratio)
    widest = max(3 * mlp * item, vision.embed_dim * (4 * item + 16))
    encode = patches * (vision.patch_dim * item + 2 * vision.embed_dim * item + widest)
    return max(decode, encode)


def allocate_kv_cache(
    config: ModelConfig,
    size: int,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerCache]:
    """Return zeroed K and V caches [num_blocks, KV heads of rank, block_size, head_dim] per layer.

    They are zeroed because masked keys multiply values by zero, which must be finite.
    """
    heads = num_kv_heads_per_rank(config, size)
    shape = (num_blocks, heads, block_size, config.head_dim)

    def cache() -> Cache:
        if dtype != FP8:
            return _zeros(shape, dtype, device)
        return Fp8Cache(_zeros(shape, torch.uint8, device), _zeros(shape[:3], SCALE, device))

    return [(cache(), cache()) for _ in range(config.num_hidden_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy gets zero pages from the kernel at first use; torch.zeros would write all pages now.
    whole = np.zeros(shape, {1: np.uint8, 2: np.uint16, 4: np.float32}[dtype.itemsize])
    return torch.from_numpy(whole).view(dtype)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return (free, total) bytes of the device.

    For a CPU, these are those of the machine, within the container's limits.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = available_memory()
    return memory.bytes, memory.total_bytes
