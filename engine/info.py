"""What a checkpoint is and needs, from its JSON files and tensor shapes alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .capacity import CPU_FRACTION, CPU_MOST
from .config import EngineConfig, ModelConfig, PreprocessConfig
from .hub import resolve_model
from .model.parallel import (
    TensorParallel,
    check_tensor_parallel_size,
    num_kv_heads_per_rank,
    valid_tensor_parallel_sizes,
)
from .model.qwen2_vl import Qwen2VL
from .runner.kv_cache import device_memory, kv_block_bytes
from .runner.loader import resolve_dtype
from .worker.worker import resolve_device


@dataclass(frozen=True)
class CheckpointInfo:
    """Sizes of one checkpoint on this machine; bytes and tokens are of one rank."""

    model: str
    checkpoint_dtype: str
    weight_format: str  # of a quantised checkpoint's decoder; "" where it is dense
    hidden_size: int
    layers: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    vision_layers: int
    vision_width: int
    parameters: int
    vision_parameters: int
    max_position_embeddings: int
    max_image_tokens: int
    tensor_parallel_size: int
    tensor_parallel_sizes: tuple[int, ...]
    device: str
    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    free_bytes: int
    kv_cache_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        short = min(4096, self.max_position_embeddings)
        sizes = ", ".join(map(str, self.tensor_parallel_sizes))
        return "\n".join(
            [
                f"{self.model}: Qwen2-VL, {self.parameters / 1e6:,.1f} M parameters "
                f"({self.vision_parameters / 1e6:,.1f} M of them vision), "
                + ", ".join(filter(None, (self.checkpoint_dtype, self.weight_format))),
                f"  decoder    {self.layers} layers of {self.hidden_size}, "
                f"{self.attention_heads} heads of {self.head_dim} over {self.kv_heads} KV heads, "
                f"vocabulary {self.vocab_size:,}",
                f"  vision     {self.vision_layers} layers of {self.vision_width}; "
                f"an image takes up to {self.max_image_tokens:,} tokens",
                f"  positions  {self.max_position_embeddings:,}; --max-model-len may be more, "
                "since a video's tokens share them",
                f"  ranks      --tensor-parallel-size may be {sizes}",
                f"On {self.device} in {self.dtype}, {self.tensor_parallel_size} rank(s), each with",
                f"  weights    {self.weight_bytes / 1e9:.2f} GB",
                f"  KV cache   {self.kv_bytes_per_token:,} bytes a token",
                f"  free now   {self.free_bytes / 1e9:.2f} GB",
                f"  fits       {self.kv_cache_tokens:,} tokens of KV cache: "
                f"{self.kv_cache_tokens // short} requests of {short:,} tokens",
            ]
        )


def checkpoint_info(model: str | None, hub: str, dtype: str, size: int) -> CheckpointInfo:
    """Reads a checkpoint's files. Raises `ConfigError`."""
    folder = resolve_model(model, hub)
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    check_tensor_parallel_size(config, size)
    device = resolve_device("auto", 0)
    kind = resolve_dtype(dtype, device, config.dtype)
    dense = replace(config, weight_format=None)  # what a CPU holds, and what parameters count as
    held = dense if device.type == "cpu" else config
    shard = Qwen2VL(held, TensorParallel(0, size), kind)
    whole = Qwen2VL(dense, TensorParallel(), kind)
    weights = sum(p.nbytes for p in shard.parameters())
    free, _ = device_memory(device)
    room = max(0, free - weights)
    if device.type == "cpu":
        cache = min(int(max(0, free - size * weights) * CPU_FRACTION / size), CPU_MOST)
    else:
        cache = int(room * EngineConfig().gpu_memory_utilization)
    per_token = kv_block_bytes(config, size, 1, kind)
    return CheckpointInfo(
        model=model or _embedded_name(folder),
        checkpoint_dtype=config.dtype,
        weight_format=config.weight_format.label if config.weight_format else "",
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        attention_heads=config.num_attention_heads,
        kv_heads=num_kv_heads_per_rank(config, 1),
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        vision_layers=config.vision.depth,
        vision_width=config.vision.embed_dim,
        parameters=sum(p.numel() for p in whole.parameters()),
        vision_parameters=sum(p.numel() for p in whole.visual.parameters()),
        max_position_embeddings=config.max_position_embeddings,
        max_image_tokens=preprocess.max_pixels // config.vision.resize_factor**2,
        tensor_parallel_size=size,
        tensor_parallel_sizes=valid_tensor_parallel_sizes(config),
        device=device.type,
        dtype=str(kind).removeprefix("torch."),
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        free_bytes=free,
        kv_cache_tokens=cache // per_token,
    )


def _embedded_name(folder: Path) -> str:
    return f"the embedded model ({folder})"
