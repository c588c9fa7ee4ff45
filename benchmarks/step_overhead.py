"""Overhead of the engine and gRPC per step: real engine and processes, workers that only sleep."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.engine.core.engine import Engine
from octavo.engine.runner.batch import BatchResult
from octavo.engine.worker import process
from octavo.scheduler.params import SamplingParams

from .fakes.sleeping_worker import VARIABLE

WARM_UP = 10  # tokens of each request


@dataclass(frozen=True)
class OverheadReport:
    """Milliseconds per step, over steps in which all requests decode."""

    num_ranks: int
    num_requests: int
    overlap: bool
    sleep_ms: float  # duration of a worker's sleep
    step_ms: tuple[float, ...]  # from one result to the next

    @property
    def between_ms(self) -> float:
        """Mean step time minus the requested sleep; includes oversleeping."""
        return float(np.mean(self.step_ms)) - self.sleep_ms

    def as_dict(self) -> dict[str, float]:
        return {
            "ranks": self.num_ranks,
            "requests": self.num_requests,
            "overlap": self.overlap,
            "sleep_ms": self.sleep_ms,
            "step_ms": float(np.mean(self.step_ms)),
            "between_ms": self.between_ms,
        }

    def as_text(self) -> str:
        how = "overlapped" if self.overlap else "sequential"
        return (
            f"{self.num_ranks} ranks, {self.num_requests} requests, {how}: "
            f"step {np.mean(self.step_ms):.2f} ms, of which overhead {self.between_ms:.2f} ms"
        )


def run(
    num_ranks: int,
    num_requests: int,
    overlap: bool,
    prompt_len: int = 64,
    sleep_ms: float = 5.0,
    steps: int = 400,
) -> OverheadReport:
    """Measure one configuration. Raises ValueError naming the invalid option."""
    given = {"ranks": num_ranks, "num-requests": num_requests, "steps": steps}
    for name, value in {**given, "prompt-len": prompt_len}.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    settings: dict[str, Any] = {
        "tensor_parallel_size": num_ranks,
        "max_num_seqs": num_requests,
        "max_num_batched_tokens": 64 * num_requests + 16384,
        "kv_cache_memory_bytes": 1 << 36,  # not allocated: the workers only sleep
        "overlap_steps": overlap,
    }
    with sleeping(sleep_ms), Engine(**settings) as engine:
        done = _measure(engine, num_requests, prompt_len, steps)
    step_ms = tuple((np.diff(done) * 1e3).tolist())
    return OverheadReport(num_ranks, num_requests, overlap, sleep_ms, step_ms)


@contextmanager
def sleeping(sleep_ms: float) -> Iterator[None]:
    """Make workers started within the context only sleep."""
    module, process.WORKER_MODULE = process.WORKER_MODULE, "octavo.benchmarks.fakes.sleeping_worker"
    os.environ[VARIABLE] = str(sleep_ms)
    try:
        yield
    finally:
        process.WORKER_MODULE = module
        del os.environ[VARIABLE]


def _measure(engine: Engine, num_requests: int, prompt_len: int, steps: int) -> list[float]:
    """Return the time in seconds at which each step's result was received."""
    params = SamplingParams(temperature=0, max_tokens=1 << 14, ignore_eos=True)
    for index in range(num_requests):
        engine.add_request(None, {"prompt_token_ids": [index % 200] * prompt_len}, params)
    done: list[float] = []
    receive = engine.group.receive

    def watched() -> BatchResult:
        result = receive()
        done.append(time.perf_counter())
        return result

    engine.group.receive = watched  # type: ignore[method-assign]
    states = engine.scheduler.requests.values()
    while any(request.num_output_tokens < WARM_UP for request in states):
        engine.step()
    done.clear()
    while len(done) < steps:
        engine.step()
    return done
