"""Worker process of one rank: `python -P -m octavo.engine.worker.worker --socket PATH`.

It serves `octavo.worker.v1.Worker` on a Unix socket and exits when its standard input closes, that
is, when its parent exits for any reason.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from ...proto import worker_pb2 as pb
from ...proto import worker_pb2_grpc
from ..config.engine_config import ModelConfig, PreprocessConfig
from ..errors import ConfigError
from ..utils.cores import num_cores
from ..utils.failpoints import CutOff, failpoint
from ..utils.logs import set_up_worker_logs
from ..utils.malloc_arenas import limit_malloc_arenas
from .link import UNLIMITED
from .parent import end_with_parent
from .remote.membership import WorkerSpec, use_interface
from .socket_folder import GROUP_FOLDER
from .step_order import MissedStep, StepSequence
from .wire import pack_result, unpack_step

if TYPE_CHECKING:
    import torch

    from ..model.parallel import TensorParallel
    from ..runner.batch import InputBatch
    from ..runner.model_runner import ModelRunner
    from ..runner.pending import PendingResult

log = logging.getLogger("octavo.worker")

RENDEZVOUS = "rendezvous"  # file name in a group's folder


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """Serves one `ModelRunner`. Steps run one after another; pings are answered meanwhile."""

    def __init__(
        self,
        spec: WorkerSpec | None = None,
        is_claimed_for: Callable[[int], bool] | None = None,
        shared: int | None = None,
    ) -> None:
        """Create the servicer; the model is loaded by `Load`.

        `spec` and `is_claimed_for` are set for remote workers, which load only in the epoch of the
        engine that claimed them. `shared`: file descriptor of the memory that local ranks share.
        """
        self._spec, self._is_claimed_for, self._shared = spec, is_claimed_for, shared
        self.epoch = 0
        self.rank = 0
        self.runner: ModelRunner | None = None
        self._steps: StepSequence[tuple[PendingResult, float]] = StepSequence()

    def Load(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> Iterator:
        """Load in a separate thread, so that progress can be streamed."""
        items: queue.SimpleQueue[pb.LoadProgress | BaseException] = queue.SimpleQueue()

        def report(done: int, total: int) -> None:
            items.put(pb.LoadProgress(done_bytes=done, total_bytes=total))

        if self._is_claimed_for is not None and self._is_claimed_for(request.epoch):
            use_interface(context.peer())

        def load() -> None:
            try:
                items.put(pb.LoadProgress(memory=self._load(request, report)))
            except BaseException as error:
                items.put(error)

        threading.Thread(target=load, name="load", daemon=True).start()
        while True:
            item = items.get()
            if isinstance(item, BaseException):
                _abort(context, item)
                return
            yield item
            if item.HasField("memory"):
                return

    def _load(self, request: pb.LoadRequest, report: Callable[[int, int], None]) -> pb.MemoryReport:
        from ..model.parallel import check_tensor_parallel_size
        from ..runner.loader import (
            check_weight_format,
            resolve_dtype,
            resolve_kv_cache_dtype,
            resolve_quantization,
        )
        from ..runner.model_runner import ModelRunner

        spec = self._spec
        if self._is_claimed_for is not None and not self._is_claimed_for(request.epoch):
            raise RuntimeError("the worker is not claimed by this engine")
        model_dir = Path(request.model) if spec is None else spec.model
        config = ModelConfig.from_dir(model_dir)
        check_tensor_parallel_size(config, request.tensor_parallel_size)
        device = resolve_device(request.device, request.rank if spec is None else spec.local_rank)
        dtype = resolve_dtype(request.dtype, device, config.dtype)
        kv_cache_dtype = resolve_kv_cache_dtype(request.kv_cache_dtype, device, dtype)
        check_weight_format(config, device, dtype)
        self.epoch, self.rank = request.epoch, request.rank
        failpoint("worker.load", self.rank)
        _share_cores(request.num_sharing)
        self.runner = ModelRunner(
            model_dir,
            config,
            PreprocessConfig.from_dir(model_dir),
            device,
            dtype,
            request.block_size,
            self._connect(request, device),
            resolve_quantization(request.quantization, device),
            kv_cache_dtype,
        )
        self.runner.load(report)
        memory = self.runner.measure()
        return pb.MemoryReport(
            weight_bytes=memory.weight_bytes,
            total_bytes=memory.total_bytes,
            free_bytes=memory.free_bytes,
            kv_block_bytes=memory.kv_block_bytes,
            dtype=memory.dtype,
            device=memory.device,
        )

    def _connect(self, request: pb.LoadRequest, device: torch.device) -> TensorParallel:
        from ..model.parallel import connect
        from .remote.torch_store import RendezvousStore

        rank, size = request.rank, request.tensor_parallel_size
        if self._spec is None:
            return connect(rank, size, device, request.rendezvous, self._shared)
        return connect(rank, size, device, RendezvousStore(self._spec.rendezvous))

    def Allocate(
        self, request: pb.AllocateRequest, context: grpc.ServicerContext
    ) -> pb.AllocateReply:
        try:
            self._runner_of(request.epoch).allocate(request.num_blocks)
        except Exception as error:
            _abort(context, error)
        return pb.AllocateReply()

    def Step(self, request: pb.StepRequest, context: grpc.ServicerContext) -> pb.StepReply:
        try:
            failpoint("worker.received", self.rank)
            return self._step(request)
        except (MissedStep, CutOff) as error:  # the group sends the step again
            missed = isinstance(error, MissedStep)
            code = grpc.StatusCode.ABORTED if missed else grpc.StatusCode.UNAVAILABLE
            context.abort(code, f"rank {self.rank}: {error}")
        except Exception as error:
            _abort(context, error)
        raise AssertionError  # unreachable: `abort` raises

    def _step(self, request: pb.StepRequest) -> pb.StepReply:
        runner, batch = self._runner_of(request.epoch), unpack_step(request)
        failpoint("worker.unpacked", self.rank)
        step_id = request.step_id
        launched = self._steps.submit(
            request.previous_step_id, step_id, lambda: self._launch(runner, batch)
        )
        pending, start = launched.result()
        result = pending.wait()
        seconds = time.perf_counter() - start
        reply = pack_result(result, request.epoch, step_id, seconds)
        failpoint("worker.replies", self.rank)
        return reply

    def _launch(self, runner: ModelRunner, batch: InputBatch) -> tuple[PendingResult, float]:
        start = time.perf_counter()
        pending = runner.launch(batch)
        failpoint("worker.computed", self.rank)
        return pending, start

    def Ping(self, request: pb.PingRequest, context: grpc.ServicerContext) -> pb.PingReply:
        # The epoch is also the group's secret, so return it only to callers that know it.
        epoch = self.epoch if request.epoch == self.epoch else 0
        return pb.PingReply(epoch=epoch, step_id=self._steps.latest)

    def _runner_of(self, epoch: int) -> ModelRunner:
        if self.runner is None or epoch != self.epoch:
            raise RuntimeError(f"epoch {epoch} is not the current one")
        return self.runner


def _share_cores(num_sharing: int) -> None:
    """Set the number of threads, before any of them computes; 0: it is set in the environment."""
    import torch

    if num_sharing and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // num_sharing))


def resolve_device(name: str, rank: int) -> torch.device:
    """Return the device of a local rank; "auto" is CUDA if available, else the CPU.

    Raises `ConfigError` if the name is invalid or the rank has no GPU.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={name!r}: must be auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if rank >= count:
        raise ConfigError(
            f"device={name!r}: rank {rank} has no GPU, this machine has {count}; use fewer ranks "
            "per machine"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _abort(context: grpc.ServicerContext, error: BaseException) -> None:
    """Abort the call with FAILED_PRECONDITION for configuration errors, else with INTERNAL."""
    if isinstance(error, ValueError):  # ConfigError and similar errors, whose text is for the user
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    log.error("worker failed", exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")


def _remove_files(socket: Path) -> None:
    """Remove the group's files, which a killed parent leaves behind.

    Other files are kept, because an operator may have chosen the socket's folder.
    """
    socket.unlink(missing_ok=True)
    if socket.parent.name.startswith(GROUP_FOLDER):
        (socket.parent / RENDEZVOUS).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: the last rank removes the folder
            socket.parent.rmdir()


def main(make: type[WorkerServicer] = WorkerServicer) -> None:
    """Serve until the parent exits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--socket",
        required=True,
        help="path of the Unix socket to serve on",
    )
    parser.add_argument(
        "--shared", type=int, help="file descriptor of the memory that the ranks share"
    )
    args = parser.parse_args()
    socket = Path(args.socket)
    set_up_worker_logs()
    for number in (signal.SIGINT, signal.SIGTERM):  # only the engine ends this process
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(lambda: _remove_files(socket))
    limit_malloc_arenas()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=32), options=UNLIMITED)
    worker_pb2_grpc.add_WorkerServicer_to_server(make(shared=args.shared), server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
