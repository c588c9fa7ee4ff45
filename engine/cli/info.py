"""`octavo info`: a checkpoint's sizes and memory needs, without loading its weights.

Reads only the JSON files and the headers of the weight files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.engine_config import EngineConfig, ModelConfig, PreprocessConfig
from ..config.hub import resolve_model
from ..core.kv_capacity import plan_capacity
from ..errors import ConfigError
from ..model.layers import VocabParallelEmbedding
from ..model.parallel import (
    TensorParallel,
    check_tensor_parallel_size,
    num_kv_heads_per_rank,
    valid_tensor_parallel_sizes,
)
from ..model.qwen2_vl import Qwen2VL
from ..model.weights import DenseWeight
from ..runner.kv_cache import device_memory, kv_block_bytes
from ..runner.loader import (
    check_checkpoint,
    checkpoint_files,
    resolve_dtype,
    resolve_kv_cache_dtype,
    resolve_quantization,
)
from ..worker.loading import GroupMemory
from ..worker.worker import resolve_device


@dataclass(frozen=True)
class CheckpointInfo:
    """Sizes of a checkpoint on this machine; bytes and tokens are per rank."""

    model: str
    checkpoint_dtype: str
    weight_format: str  # of a quantized decoder; "" if the checkpoint is dense
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
    weight_files: int
    weight_file_bytes: int
    weight_error: str  # an error in the weight files; "" if they match the configuration

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        short = min(4096, self.max_position_embeddings)
        sizes = ", ".join(map(str, self.tensor_parallel_sizes))
        return "\n".join(
            [
                f"{self.model}: Qwen2-VL, {self.parameters / 1e6:,.1f} M parameters "
                f"({self.vision_parameters / 1e6:,.1f} M of them in the vision tower), "
                + ", ".join(filter(None, (self.checkpoint_dtype, self.weight_format))),
                f"  decoder    {self.layers} layers of {self.hidden_size}, "
                f"{self.attention_heads} heads of {self.head_dim} over {self.kv_heads} KV heads, "
                f"vocabulary {self.vocab_size:,}",
                f"  vision     {self.vision_layers} layers of {self.vision_width}; "
                f"up to {self.max_image_tokens:,} tokens per image",
                f"  positions  {self.max_position_embeddings:,}; --max-model-len may be higher, "
                "since tokens of a video share positions",
                f"  ranks      valid --tensor-parallel-size: {sizes}",
                f"On {self.device} in {self.dtype}, {self.tensor_parallel_size} rank(s), per rank:",
                f"  weights    {self.weight_bytes / 1e9:.2f} GB",
                f"  KV cache   {self.kv_bytes_per_token:,} bytes per token",
                f"  free now   {self.free_bytes / 1e9:.2f} GB",
                f"  files      {self.weight_error or self._files()}",
                f"  fits       {self.kv_cache_tokens:,} tokens of KV cache: "
                f"{self.kv_cache_tokens // short} requests of {short:,} tokens",
            ]
        )

    def _files(self) -> str:
        size = f"{self.weight_file_bytes / 1e9:.2f} GB"
        return f"{self.weight_files} weight files, {size}; complete"


def checkpoint_info(
    model: str | None,
    hub: str,
    dtype: str,
    size: int,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
) -> CheckpointInfo:
    """Return a checkpoint's sizes. Raises `ConfigError`.

    The KV cache size is what `octavo serve` would use with these settings and defaults for others.
    """
    folder = resolve_model(model, hub)
    config, preprocess = ModelConfig.from_dir(folder), PreprocessConfig.from_dir(folder)
    check_tensor_parallel_size(config, size)
    device = resolve_device("auto", 0)
    kind = resolve_dtype(dtype, device, config.dtype)
    dense = replace(config, weight_format=None)  # the format on a CPU, and for counting parameters
    held = dense if device.type == "cpu" else config
    shard = Qwen2VL(held, TensorParallel(0, size), kind)
    whole = Qwen2VL(dense, TensorParallel(), kind)
    settings = EngineConfig(
        model=folder,
        tensor_parallel_size=size,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
    )
    weights = _weight_bytes(shard, resolve_quantization(quantization or "", device))
    free, total = device_memory(device)
    kept = resolve_kv_cache_dtype(kv_cache_dtype, device, kind)
    left = max(0, free - weights * (size if device.type == "cpu" else 1))
    block_bytes = kv_block_bytes(config, size, settings.block_size, kept)
    dtype_name = str(kind).removeprefix("torch.")
    memory = GroupMemory(weights, total, left, block_bytes, dtype_name, device.type)
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
        dtype=dtype_name,
        weight_bytes=weights,
        kv_bytes_per_token=kv_block_bytes(config, size, 1, kept),
        free_bytes=free,
        kv_cache_tokens=_kv_tokens(settings, config, memory),
        **_check_weight_files(folder, config, kind),
    )


def _check_weight_files(folder: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Compare the headers of the weight files with the configuration, as workers do."""
    size, error = 0, ""
    files: tuple[Path, ...] = ()
    try:
        files = checkpoint_files(folder)
        check_checkpoint(Qwen2VL(config, TensorParallel(), dtype), folder, config)
        size = sum(file.stat().st_size for file in files)
    except ConfigError as found:
        error = str(found)
    return {"weight_files": len(files), "weight_file_bytes": size, "weight_error": error}


def _weight_bytes(model: nn.Module, quantization: str | None) -> int:
    """Return the bytes of the loaded weights.

    In int8, each row has a scale and a zero point of 4 bytes each. Rows shared with the embedding
    are kept in the original format too.
    """
    total = sum(p.nbytes for p in model.parameters())
    if quantization is None:
        return total
    tied = {each.tied for each in model.modules() if isinstance(each, VocabParallelEmbedding)}
    for each in model.modules():
        if isinstance(each, DenseWeight):
            weight = each.get_parameter("weight")
            rows, columns = weight.shape
            total += rows * (columns + 8) - (0 if each in tied else weight.nbytes)
    return total


def _kv_tokens(settings: EngineConfig, config: ModelConfig, memory: GroupMemory) -> int:
    """Return the KV cache size in tokens; 0 if not even one block fits."""
    try:
        return plan_capacity(settings, config, memory)[0] * settings.block_size
    except ConfigError:
        return 0


def _embedded_name(folder: Path) -> str:
    return f"the embedded model ({folder})"
