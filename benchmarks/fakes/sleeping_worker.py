"""A worker whose steps sleep for a set time, to measure the overhead of the engine and gRPC.

python -P -m octavo.benchmarks.fakes.sleeping_worker --socket PATH
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from octavo.engine.runner.batch import BatchResult, InputBatch
from octavo.engine.worker.worker import WorkerServicer, main
from octavo.proto import worker_pb2 as pb

VARIABLE = "OCTAVO_SLEEP_MS"
TOKENS = "OCTAVO_SLEEP_TOKENS"  # comma-separated ids; step i samples the i-th, cyclically
TOKEN = 7  # sampled by every row by default


class SleepingRunner:
    """Replacement for `ModelRunner` that sleeps."""

    def __init__(self, seconds: float, tokens: Sequence[int] = (TOKEN,)) -> None:
        self._seconds, self._tokens = seconds, itertools.cycle(tokens)

    def allocate(self, num_blocks: int) -> None:
        """Do nothing: there is no KV cache."""

    def launch(self, batch: InputBatch) -> SleepingResult:
        time.sleep(self._seconds)
        return SleepingResult(len(batch.sampling.rows), next(self._tokens))


class SleepingResult:
    def __init__(self, num_samples: int, token: int) -> None:
        self._num_samples, self._token = num_samples, token

    def wait(self) -> BatchResult:
        return BatchResult(np.full(self._num_samples, self._token, np.int32))


class SleepingServicer(WorkerServicer):
    def _load(self, request: pb.LoadRequest, report: Callable[[int, int], None]) -> pb.MemoryReport:
        self.epoch, self.rank = request.epoch, request.rank
        tokens = [int(token) for token in os.environ.get(TOKENS, str(TOKEN)).split(",")]
        runner: Any = SleepingRunner(float(os.environ.get(VARIABLE, "5")) / 1e3, tokens)
        self.runner = runner
        return pb.MemoryReport(
            weight_bytes=1,
            total_bytes=1 << 34,
            free_bytes=1 << 33,
            kv_block_bytes=1 << 10,
            dtype="float32",
            device="cpu",
        )


if __name__ == "__main__":
    main(SleepingServicer)
