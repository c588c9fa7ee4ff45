"""How the ranks of a group share a model: who holds which rows, and what they exchange."""

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
    """One rank's place in its group. A group of one has no-ops for collectives."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None: torch.distributed's default group
    shared: SharedMemory | None = None  # of ranks on one machine's CPUs, instead of the group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums `x` over the ranks, in place."""
        if self.shared is not None:
            self.shared.all_reduce(x)
        elif self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Joins `x` [rows, columns of each rank] along the last axis on rank 0; None elsewhere.

        `x` must have the same shape on all ranks.
        """
        if self.size == 1:
            return x
        if self.shared is not None:
            return self.shared.gather(x)
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, dst=0, group=self.group)
        return None if parts is None else torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Fills `x` (contiguous) with what rank `source` has in it."""
        if self.shared is not None:
            self.shared.broadcast(x, source)
        elif self.size > 1:
            dist.broadcast(x, src=source, group=self.group)
        return x

    def close(self) -> None:
        """Leaves the group. gloo's threads abort a process that ends without."""
        if self.size > 1:
            dist.destroy_process_group(self.group)

    def shard(self, total: int) -> slice:
        """This rank's part of `total` rows; all are even where the ranks divide it."""
        start, stop = (rank * total // self.size for rank in (self.rank, self.rank + 1))
        return slice(start, stop)


def connect(
    rank: int,
    size: int,
    device: torch.device,
    rendezvous: str | dist.Store,
    shared: int | None = None,
) -> TensorParallel:
    """Joins the group that meets at `rendezvous`, the path of a file or a store; waits for all
    `size` ranks.

    NCCL on CUDA devices. On CPUs `shared`, the open file of memory that the ranks share, where all
    of them have it and the compiled kernels; else gloo, on the loopback interface unless
    GLOO_SOCKET_IFNAME says otherwise. A group of one needs no meeting.
    """
    if size == 1:
        return TensorParallel()
    if device.type == "cpu":  # gloo else looks up the host's name, which may not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meets_at: dict[str, Any] = (
        {"init_method": f"file://{rendezvous}"}
        if isinstance(rendezvous, str)
        else {"store": rendezvous}
    )
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        **meets_at,
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=10),
    )
    if device.type == "cpu" and _all_have(shared is not None and native.library() is not None):
        assert shared is not None
        return TensorParallel(rank, size, shared=SharedMemory(shared, rank, size))
    return TensorParallel(rank, size)


def _all_have(it: bool) -> bool:
    have = torch.tensor(int(it))
    dist.all_reduce(have, dist.ReduceOp.MIN)
    return bool(have)


def valid_tensor_parallel_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Rank counts that can serve the checkpoint: 1, 2 and 4 for the 2B and the 7B, for the 72B also
    8. They share the attention heads evenly, and KV heads evenly or as copies; weights of four bits
    are cut between groups of inputs and between words of eight outputs, which may exclude some."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return tuple(
        size
        for size in (1, 2, 4, 8)
        if heads % size == 0
        and (kv_heads % size == 0 or size % kv_heads == 0)
        and _between_groups(config, size)
    )


def _between_groups(config: ModelConfig, size: int) -> bool:
    """Whether `size` ranks can share weights of four bits without cutting a group or a word."""
    group = config.weight_format.group_size if config.weight_format else 0
    cut = (config.num_attention_heads * config.head_dim, config.intermediate_size)  # o, down
    words = config.intermediate_size % (8 * size) == 0  # gate, up; heads are whole words
    return not group or (words and all(inputs % (group * size) == 0 for inputs in cut))


def check_tensor_parallel_size(config: ModelConfig, size: int) -> None:
    """Raises ConfigError where `size` ranks cannot share the attention heads evenly, or would cut
    through a group of a quantised weight."""
    valid = valid_tensor_parallel_sizes(config)
    if size not in valid:
        stored = f" in {config.weight_format.label}" if config.weight_format else ""
        raise ConfigError(
            f"tensor_parallel_size={size}: this checkpoint, with {config.num_attention_heads} "
            f"attention heads{stored}, is served by {', '.join(map(str, valid))} ranks"
        )


def num_kv_heads_per_rank(config: ModelConfig, size: int) -> int:
    """KV heads that each of `size` ranks keeps: a copy of one where ranks outnumber them."""
    return max(1, config.num_key_value_heads // size)


def kv_heads_of_rank(config: ModelConfig, parallel: TensorParallel) -> range:
    """The checkpoint's KV heads that this rank keeps: those of its query heads."""
    count = num_kv_heads_per_rank(config, parallel.size)
    first = parallel.rank * config.num_key_value_heads // parallel.size
    return range(first, first + count)
