"""Size of the KV cache, from the memory that the workers measured."""

from __future__ import annotations

import logging
from dataclasses import fields

from ...kernels import native
from ...scheduler.admission import SchedulerConfig
from ..config.engine_config import EngineConfig, ModelConfig
from ..errors import ConfigError
from ..runner.kv_cache import activation_bytes
from ..runner.loader import DTYPES
from ..worker.group import GroupMemory

log = logging.getLogger("octavo.engine")

# Prompt tokens whose computation takes about as long as reading the weights once: adding them to a
# decode step at most doubles its time. Measured on two AMX cores with the 2B model; on GPUs it
# follows from compute and memory bandwidth (H100: 989 TFLOP/s / 3.35 TB/s = 295).
CPU_LONG_PREFILL = 96
GPU_LONG_PREFILL = 256

CPU_FRACTION = 0.25  # default share of free memory
KEPT_PREFIXES = 16  # cached prefixes of maximum length, in addition to running requests
CPU_MOST = 4 << 30  # default limit in bytes per rank; `kv_cache_memory_bytes` overrides it


def plan_capacity(config: EngineConfig, model: ModelConfig, memory: GroupMemory) -> tuple[int, int]:
    """Return the number of KV blocks per rank, and the effective max_model_len.

    max_model_len may exceed the model's positions, since tokens of a video frame share a temporal
    position. Each request's positions are checked at admission, and its output ends at the last
    position (`RequestBuilder`). Raises `ConfigError` if max_model_len does not fit in memory.
    """
    longest = config.max_model_len or model.max_position_embeddings
    if longest < 1:
        raise ConfigError(f"max_model_len={longest}: must be at least 1")
    if longest > model.max_position_embeddings:
        log.info(
            "max_model_len %d exceeds the model's %d positions: only prompts with images or "
            "videos, whose tokens share positions, can be that long",
            longest,
            model.max_position_embeddings,
        )
    budget = _kv_budget(config, model, memory)
    capacity = budget // memory.kv_block_bytes
    # More blocks than running requests and kept prefixes can fill would be wasted.
    useful = (config.max_num_seqs + KEPT_PREFIXES) * _blocks(longest, config.block_size)
    num_blocks = min(capacity, useful)
    if num_blocks >= _blocks(longest, config.block_size):
        return num_blocks, longest
    fits = num_blocks * config.block_size
    if config.max_model_len is not None or fits < 1:
        raise ConfigError(
            f"max_model_len={longest}: its KV cache needs "
            f"{_blocks(longest, config.block_size) * memory.kv_block_bytes / 1e9:.2f} GB, but "
            f"{budget / 1e9:.2f} GB ({fits} tokens) are available; lower max_model_len or raise "
            "kv_cache_memory_bytes (or gpu_memory_utilization)"
        )
    log.info("max_model_len reduced to %d from %d to fit the KV cache memory", fits, longest)
    return num_blocks, fits


def scheduler_config(config: EngineConfig, num_blocks: int, device: str) -> SchedulerConfig:
    """Return the scheduler's configuration: fields of the same names, and the measured capacity."""
    names = {field.name for field in fields(SchedulerConfig)}
    given = {name: value for name, value in vars(config).items() if name in names}
    usual = CPU_LONG_PREFILL if device == "cpu" else GPU_LONG_PREFILL
    given["long_prefill_token_threshold"] = config.long_prefill_token_threshold or usual
    return SchedulerConfig(**given, num_blocks=num_blocks)


def _kv_budget(config: EngineConfig, model: ModelConfig, memory: GroupMemory) -> int:
    """Return the bytes for KV blocks on the rank with the least free memory.

    On a GPU, activation memory is reserved: an estimate from the step limits, not a profile run.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if memory.device == "cpu":
        share = memory.free_bytes * CPU_FRACTION / config.tensor_parallel_size
        return min(int(share), CPU_MOST)
    step = activation_bytes(
        model,
        config.tensor_parallel_size,
        config.max_num_batched_tokens,
        config.max_encode_tokens,
        DTYPES[memory.dtype],
    )
    log.info(
        "%.2f GB are reserved for a step of %d tokens and %d encoder tokens",
        step / 1e9,
        config.max_num_batched_tokens,
        config.max_encode_tokens,
    )
    used = memory.total_bytes - memory.free_bytes
    return max(0, int(memory.total_bytes * config.gpu_memory_utilization) - used - step)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def log_capacity(config: EngineConfig, memory: GroupMemory, num_blocks: int) -> None:
    if memory.device == "cpu" and memory.dtype == "bfloat16" and native.library() is None:
        log.warning(
            "compiled CPU kernels are not available, steps are slower; install Octavo with gcc "
            "present, on a processor with AVX512-BF16"
        )
    log.info(
        "%s, %s on %s%s: weights %.2f GB, %d KV blocks of %d tokens (%.2f GB per rank), "
        "max_model_len %d",
        config.model.name,
        memory.dtype,
        memory.device,
        f" ({native.instructions()})" if memory.device == "cpu" else "",
        memory.weight_bytes / 1e9,
        num_blocks,
        config.block_size,
        num_blocks * memory.kv_block_bytes / 1e9,
        config.max_model_len,
    )
