"""Load the weights on all workers of a group in parallel."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from ...proto import worker_pb2 as pb
from ..config.engine_config import EngineConfig
from ..errors import ConfigError
from ..utils.lifetime import track_call
from .link import WorkerLink


@dataclass(frozen=True)
class GroupMemory:
    """Memory of a group after loading; bytes are those of the rank with the least free memory.

    `weight_bytes` is the total of all ranks.
    """

    weight_bytes: int
    total_bytes: int
    free_bytes: int
    kv_block_bytes: int
    dtype: str
    device: str

    @classmethod
    def of(cls, reports: Sequence[pb.MemoryReport]) -> GroupMemory:
        """Combine the ranks' reports. Raises `ConfigError` if dtypes or device types differ."""
        kinds = sorted({f"{each.dtype} on {each.device.partition(':')[0]}" for each in reports})
        if len(kinds) > 1:
            raise ConfigError(
                f"the workers use different dtypes or devices: {' and '.join(kinds)}; set dtype "
                "and device"
            )
        least = min(reports, key=lambda report: report.free_bytes)
        return cls(
            weight_bytes=sum(report.weight_bytes for report in reports),
            total_bytes=least.total_bytes,
            free_bytes=least.free_bytes,
            kv_block_bytes=least.kv_block_bytes,
            dtype=least.dtype,
            device=least.device,
        )


def start_loading(
    workers: Sequence[WorkerLink],
    config: EngineConfig,
    rendezvous: Path | None,
    sharing: Sequence[int],
) -> queue.SimpleQueue[tuple[int, pb.LoadProgress | Exception]]:
    """Start loading on all ranks; return a queue of (rank, progress, memory report or error).

    The ranks connect through the file `rendezvous`, or over the engine's streams if it is None.
    `sharing`: for remote workers, the number of workers that share each one's cores.
    """
    items: queue.SimpleQueue[tuple[int, pb.LoadProgress | Exception]] = queue.SimpleQueue()

    def read(rank: int, call: Iterable[pb.LoadProgress]) -> None:
        try:
            for item in call:
                items.put((rank, item))
        except grpc.RpcError as error:
            items.put((rank, error))

    for worker in workers:
        call = track_call(
            worker.stub.Load(
                pb.LoadRequest(
                    epoch=worker.epoch,
                    model=str(config.model),
                    device=config.device,
                    dtype=config.dtype,
                    rank=worker.rank,
                    tensor_parallel_size=len(workers),
                    rendezvous=str(rendezvous or ""),
                    block_size=config.block_size,
                    quantization=config.quantization or "",
                    kv_cache_dtype=config.kv_cache_dtype,
                    num_sharing=sharing[worker.rank] if sharing else 0,
                )
            )
        )
        args = (worker.rank, call)
        threading.Thread(target=read, args=args, name="load", daemon=True).start()
    return items
