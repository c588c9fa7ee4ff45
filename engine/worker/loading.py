"""How a group's workers load their shares of the weights, all at once."""

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
    """What loading measured; bytes are of the rank with the least room."""

    weight_bytes: int
    total_bytes: int
    free_bytes: int
    kv_block_bytes: int
    dtype: str
    device: str

    @classmethod
    def of(cls, reports: Sequence[pb.MemoryReport]) -> GroupMemory:
        """What the ranks' reports come to. Raises `ConfigError` where they do not fit together."""
        kinds = sorted({f"{each.dtype} on {each.device.partition(':')[0]}" for each in reports})
        if len(kinds) > 1:
            raise ConfigError(
                f"the workers differ: {' and '.join(kinds)}; name dtype and device, so that all "
                "take the same"
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
    """Has all ranks load. (rank, item) as they come: progress, at last the memory; or an error.

    They meet at the file `rendezvous`, or, without one, over their engine's streams. `sharing`: how
    many share each one's cores, of workers that were started apart."""
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
