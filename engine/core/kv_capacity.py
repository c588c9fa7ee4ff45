"""How many KV blocks there are, from what was measured. Nothing is written back."""

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

# Tokens of a prompt whose computing takes about as long as reading the weights once: beside a
# decoding step they make it at most twice as long. Measured on two AMX cores at the 2B shape; on
# GPUs it follows from their matrix and memory rates (H100: 989 TF/s over 3.35 TB/s is 295).
CPU_LONG_PREFILL = 96
GPU_LONG_PREFILL = 256

CPU_FRACTION = 0.25  # of free memory; the rest is the user's
KEPT_PREFIXES = 16  # of the longest requests, beside those that run
CPU_MOST = 4 << 30  # bytes a rank; `kv_cache_memory_bytes` asks for more


def plan_capacity(config: EngineConfig, model: ModelConfig, memory: GroupMemory) -> tuple[int, int]:
    """Number of KV blocks a rank, and the max_model_len that holds.

    It may be over the model's positions, which a video's tokens share: each request's positions
    are checked when it comes, and its answer ends where they do (`RequestBuilder`). Raises
    `ConfigError` when memory does not hold what was asked.
    """
    longest = config.max_model_len or model.max_position_embeddings
    if longest < 1:
        raise ConfigError(f"max_model_len={longest}: must be at least 1")
    if longest > model.max_position_embeddings:
        log.info(
            "max_model_len %d is over the model's %d positions, which a video's tokens share",
            longest,
            model.max_position_embeddings,
        )
    budget = _kv_budget(config, model, memory)
    room = budget // memory.kv_block_bytes
    # What can run at once, and as many of the longest to be found again.
    useful = (config.max_num_seqs + KEPT_PREFIXES) * _blocks(longest, config.block_size)
    num_blocks = min(room, useful)
    if num_blocks >= _blocks(longest, config.block_size):
        return num_blocks, longest
    fits = num_blocks * config.block_size
    if config.max_model_len is not None or fits < 1:
        raise ConfigError(
            f"max_model_len={longest}: its KV cache needs "
            f"{_blocks(longest, config.block_size) * memory.kv_block_bytes / 1e9:.2f} GB, there is "
            f"room for {budget / 1e9:.2f} GB ({fits} tokens); lower max_model_len or raise "
            "kv_cache_memory_bytes (or gpu_memory_utilization)"
        )
    log.info("max_model_len %d instead of %d: what the KV memory holds", fits, longest)
    return num_blocks, fits


def scheduler_config(config: EngineConfig, num_blocks: int, device: str) -> SchedulerConfig:
    """The settings that the scheduler knows by the same names, and what was measured."""
    names = {field.name for field in fields(SchedulerConfig)}
    given = {name: value for name, value in vars(config).items() if name in names}
    usual = CPU_LONG_PREFILL if device == "cpu" else GPU_LONG_PREFILL
    given["long_prefill_token_threshold"] = config.long_prefill_token_threshold or usual
    return SchedulerConfig(**given, num_blocks=num_blocks)


def _kv_budget(config: EngineConfig, model: ModelConfig, memory: GroupMemory) -> int:
    """Bytes for KV blocks on the rank with the least room. On a GPU a step's own needs are kept
    free: they follow from the limits of a step, not from a trial run."""
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
        "%.2f GB are kept for a step of %d tokens, %d of them encoded",
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
            "the compiled CPU kernels are not there, and steps take longer: they need gcc when "
            "Octavo is installed, and a processor with AVX512-BF16"
        )
    log.info(
        "%s, %s on %s%s: weights %.2f GB, %d KV blocks of %d tokens (%.2f GB a rank), "
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
