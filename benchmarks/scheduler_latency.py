"""Scheduler latency per step, without a worker or model: all requests decode."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.scheduler.admission import SchedulerConfig
from octavo.scheduler.params import SamplingParams
from octavo.scheduler.request import Request
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.step import StepPlan, StepResult

BLOCK_SIZE = 16
WARM_UP = 64  # steps; four blocks per request
STEPS = 512
TOKEN = 7  # sampled by every row


@dataclass(frozen=True)
class LatencyReport:
    """Milliseconds of each call over `STEPS` steps of steady decoding."""

    num_requests: int
    prompt_len: int
    schedule_ms: tuple[float, ...]
    update_ms: tuple[float, ...]

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {"schedule_ms": _stats(self.schedule_ms), "update_ms": _stats(self.update_ms)}

    def as_text(self) -> str:
        lines = [f"{self.num_requests} requests decode after prompts of {self.prompt_len} tokens"]
        for name, stats in self.as_dict().items():
            median, p99 = stats["median"], stats["p99"]
            lines.append(f"  {name[:-3]:<9} median {median:7.3f} ms   p99 {p99:7.3f} ms")
        return "\n".join(lines)


def _stats(values: tuple[float, ...]) -> dict[str, float]:
    return {"median": float(np.median(values)), "p99": float(np.percentile(values, 99))}


def run(num_requests: int, prompt_len: int) -> LatencyReport:
    """Measure `STEPS` decoding steps. Raises ValueError naming the invalid option."""
    for name, value in (("num-requests", num_requests), ("prompt-len", prompt_len)):
        if value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    scheduler = filled(num_requests, prompt_len)
    while True:  # prefill
        plan, _ = step(scheduler)
        if plan.num_tokens == num_requests == len(plan.request_ids):
            break
    for _ in range(WARM_UP):
        step(scheduler)
    times = [step(scheduler)[1] for _ in range(STEPS)]
    schedule, update = zip(*times, strict=True)
    return LatencyReport(num_requests, prompt_len, schedule, update)


def filled(num_requests: int, prompt_len: int) -> Scheduler:
    """Return a scheduler with all requests waiting; no two share a prefix."""
    length = prompt_len + WARM_UP + STEPS + 64
    params: dict[str, Any] = {"max_tokens": length, "temperature": 0.0}
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_requests * -(-2 * length // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            max_num_seqs=num_requests,
            max_num_batched_tokens=max(8192, num_requests + prompt_len),
            max_model_len=2 * length,
            max_encode_tokens=1,
            encoder_cache_tokens=1,
            long_prefill_token_threshold=8192,
            max_queue_tokens=2**62,
        )
    )
    for index in range(num_requests):
        prompt = array("i", [index]) + array("i", [TOKEN]) * (prompt_len - 1)
        scheduler.add(Request(f"request-{index}", prompt, SamplingParams(**params)))
    return scheduler


def step(scheduler: Scheduler) -> tuple[StepPlan, tuple[float, float]]:
    """Run one step; return its plan and the milliseconds of `schedule` and `update`."""
    plan, schedule_ms = _timed(scheduler.schedule)
    assert plan is not None
    result = StepResult(plan.step_id, (TOKEN,) * sum(plan.samples))
    _, update_ms = _timed(lambda: scheduler.update(result))
    return plan, (schedule_ms, update_ms)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = call()
    return value, (time.perf_counter() - start) * 1e3
