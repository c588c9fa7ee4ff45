"""Cost of a snapshot for the dashboard's live view, with all blocks in use or cached.

python -P -m octavo.benchmarks.snapshot_cost
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import Any, cast

from octavo.engine.observability.snapshot import take_snapshot
from octavo.engine.observability.stats import MAX_STEPS, EngineStats, StepRecord
from octavo.scheduler.admission import SchedulerConfig
from octavo.scheduler.params import SamplingParams
from octavo.scheduler.request import Request, RequestStatus
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.step import StepResult

NUM_REQUESTS, NUM_BLOCKS, PROMPT = 64, 20_000, 3_200  # PROMPT in tokens
REPEATS = 300


def _fill(scheduler: Scheduler, first: int, count: int) -> None:
    """Add requests with distinct prompts and compute them in one step."""
    for number in range(first, first + count):
        tokens = array("i", range(number * 10_000, number * 10_000 + PROMPT))
        params = SamplingParams(max_tokens=100, temperature=0)
        scheduler.add(Request(f"request-{number}#{number}", tokens, params))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(StepResult(plan.step_id, tuple(5 for samples in plan.samples if samples)))


def _time(name: str, call: Callable[[], Any]) -> None:
    spent = []
    for _ in range(REPEATS):
        before = time.perf_counter()
        call()
        spent.append((time.perf_counter() - before) * 1e3)
    spent.sort()
    print(f"{name}: median {spent[REPEATS // 2]:.3f} ms, p99 {spent[REPEATS * 99 // 100]:.3f} ms")


def main() -> None:
    much = {"max_num_partial_prefills": NUM_REQUESTS, "long_prefill_token_threshold": 1 << 20}
    sizes = (NUM_BLOCKS, 16, NUM_REQUESTS, 1 << 20, 8192, 1024, 8192)
    scheduler = Scheduler(SchedulerConfig(*sizes, **much))
    stats = EngineStats(scheduler, cast(Any, None))
    _fill(scheduler, 0, NUM_REQUESTS)
    for request in scheduler.running[: NUM_REQUESTS // 2]:
        scheduler.finish(request.request_id, RequestStatus.FINISHED_STOPPED)
    _fill(scheduler, NUM_REQUESTS, NUM_REQUESTS // 2)
    stats.latest_steps.extend([StepRecord(1, 0.0, 0.01, 0, 0, 64)] * MAX_STEPS)
    print(
        f"{len(scheduler.running)} running requests, {NUM_BLOCKS} blocks, "
        f"{scheduler.blocks.num_evictable} of them free with a cached prefix"
    )
    _time("create, on the step thread", lambda: take_snapshot(scheduler, stats))
    _time("encode, on the reader's thread", take_snapshot(scheduler, stats).runs)


if __name__ == "__main__":
    main()
