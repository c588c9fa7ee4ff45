"""Tensor parallelism: sharding of weights over ranks, and collectives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...kernels import native
from ..config.engine_config import ModelConfig
from ..errors import ConfigError
from .shared_memory import SharedMemory


@dataclass(frozen=True)
class TensorParallel:
    """A rank in its group, and the group's collectives, which are no-ops if it has one rank."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None: torch.distributed's default group
    shared: SharedMemory | None = None  # replaces the group for ranks on one machine's CPUs

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks in place, and return it."""
        if self.shared is not None:
            self.shared.all_reduce(x)
        elif self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Concatenate `x` [rows, columns of each rank] along the last dimension on rank 0.

        `x` must have the same shape on all ranks. Returns None on other ranks.
        """
        if self.size == 1:
            return x
        if self.shared is not None:
            return self.shared.gather(x)
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, dst=0, group=self.group)
        return None if parts is None else torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Fill the contiguous `x` with rank `source`'s values, and return it."""
        if self.shared is not None:
            self.shared.broadcast(x, source)
        elif self.size > 1:
            dist.broadcast(x, src=source, group=self.group)
        return x

    def close(self) -> None:
        """Leave the group. Without this, gloo's threads abort the process at exit."""
        if self.size > 1:
            dist.destroy_process_group(self.group)

    def shard(self, total: int) -> slice:
        """Return this rank's part of `total` rows; parts are equal if `size` divides it."""
        start, stop = (rank * total // self.size for rank in (self.rank, self.rank + 1))
        return slice(start, stop)


def connect(
    rank: int,
    size: int,
    device: torch.device,
    rendezvous: str | dist.Store,
    shared: int | None = None,
) -> TensorParallel:
    """Join a group of `size` ranks, and wait for all of them (10 minutes at most).

    Args:
        rendezvous: Path of a shared file, or a store. Unused if `size` is 1.
        shared: File descriptor of memory that the ranks share, for CPUs of one machine.

    CUDA devices use NCCL. CPUs use `shared` if all ranks have it and the compiled kernels, else
    gloo on the loopback interface (override with GLOO_SOCKET_IFNAME).
    """
    if size == 1:
        return TensorParallel()
    if device.type == "cpu":  # otherwise gloo resolves the host name, which may fail
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    init_args: dict[str, Any] = (
        {"init_method": f"file://{rendezvous}"}
        if isinstance(rendezvous, str)
        else {"store": rendezvous}
    )
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        **init_args,
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=10),
    )
    if device.type == "cpu" and _all_ranks(shared is not None and native.library() is not None):
        assert shared is not None
        return TensorParallel(rank, size, shared=SharedMemory(shared, rank, size))
    return TensorParallel(rank, size)


def _all_ranks(value: bool) -> bool:
    result = torch.tensor(int(value))
    dist.all_reduce(result, dist.ReduceOp.MIN)
    return bool(result)


def valid_tensor_parallel_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Return the tensor-parallel sizes that the checkpoint supports.

    These are 1, 2 and 4 for the 2B and 7B models, and also 8 for the 72B. Attention heads must be
    divided evenly, and KV heads evenly or replicated. 4-bit weights are only split between groups
    of inputs and between words of eight outputs, which may exclude some sizes.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return tuple(
        size
        for size in (1, 2, 4, 8)
        if heads % size == 0
        and (kv_heads % size == 0 or size % kv_heads == 0)
        and _between_groups(config, size)
    )


def _between_groups(config: ModelConfig, size: int) -> bool:
    """Return whether `size` ranks can share 4-bit weights without splitting groups or words."""
    group = config.weight_format.group_size if config.weight_format else 0
    cut = (config.num_attention_heads * config.head_dim, config.intermediate_size)  # o, down
    words = config.intermediate_size % (8 * size) == 0  # gate, up; heads are whole words
    return not group or (words and all(inputs % (group * size) == 0 for inputs in cut))


def check_tensor_parallel_size(config: ModelConfig, size: int) -> None:
    """Raise ConfigError if the checkpoint does not support `size` ranks."""
    valid = valid_tensor_parallel_sizes(config)
    if size not in valid:
        stored = f" in {config.weight_format.label}" if config.weight_format else ""
        raise ConfigError(
            f"tensor_parallel_size={size}: this checkpoint, with {config.num_attention_heads} "
            f"attention heads{stored}, supports sizes {', '.join(map(str, valid))}"
        )


def num_kv_heads_per_rank(config: ModelConfig, size: int) -> int:
    """Return the KV heads per rank; one, replicated, if there are more ranks than heads."""
    return max(1, config.num_key_value_heads // size)


def kv_heads_of_rank(config: ModelConfig, parallel: TensorParallel) -> range:
    """Return the checkpoint's KV heads that this rank's query heads use."""
    count = num_kv_heads_per_rank(config, parallel.size)
    first = parallel.rank * config.num_key_value_heads // parallel.size
    return range(first, first + count)
