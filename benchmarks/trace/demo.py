"""Record a small run that shows all the scheduler's features, without a model or pixels.

Step times are modeled on measurements of a 2B model on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from octavo.scheduler.request import Request, RequestStatus
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.step import RequestUpdate, StepPlan
from octavo.scheduler.trace import TraceWriter

from ..fakes.simulated_worker import SimulatedWorker, Span, make_config, make_request

CAT, DOG, CLIP = (name * 8 for name in (b"cat!", b"dog!", b"clip"))
SYSTEM = list(range(16))  # common prefix of all chats


def seconds_of(plan: StepPlan) -> float:
    """Return a step's duration: reading weights, a share per computed token, and encoding."""
    encoded = sum(each.unit.num_tokens for each in plan.encode)
    return 0.115 + 0.0015 * plan.num_tokens + 0.0035 * encoded


def chat(name: str, question: int, *spans: Span, **more: object) -> Request:
    """Return a request: the common prefix, then the images of `spans`, then the question."""
    tokens = [*SYSTEM, *(49 for span in spans for _ in range(span[1]))]
    tokens += [(question * 7 + i) % 48 for i in range(6)]
    return make_request(name, tokens, *spans, **more)  # type: ignore[arg-type]


def arrivals() -> dict[int, list[list[Request]]]:
    """Return requests by the step before which they arrive; those in one list are forks."""
    cat, dog = (16, 24, CAT), (16, 24, DOG)
    clip = tuple((16 + 12 * i, 12, CLIP[:-1] + bytes([i])) for i in range(6))
    forks = chat("3 answers", 5, max_tokens=9)
    return {
        0: [[chat("hello", 1, max_tokens=22)], [chat("cat?", 2, cat, max_tokens=14)]],
        3: [[chat("long clip", 3, *clip, max_tokens=8)], [chat("dog?", 4, dog, max_tokens=8)]],
        6: [[forks, *[chat(f"3 answers[{i}]", 5, seed=i, max_tokens=9) for i in (1, 2)]]],
        9: [[chat("cat again", 6, cat, max_tokens=8)]],
        13: [
            [chat("high priority", 7, max_tokens=6, priority=0)],
            [chat("low priority", 8, priority=9)],
        ],
        16: [
            [chat("aborted", 9, max_tokens=20)],
            [chat("3.5 s", 10, max_tokens=30, deadline=3.5)],
        ],
    }


def record(path: Path) -> int:
    """Run the requests, write the trace and return the number of steps. Raises OSError."""
    now = 0.0
    config = make_config(
        num_blocks=60,
        max_num_seqs=7,
        max_num_batched_tokens=48,
        max_model_len=128,
        max_encode_tokens=30,
        encoder_cache_tokens=48,
        long_prefill_token_threshold=20,
    )
    scheduler = Scheduler(config, clock=lambda: now)
    worker, trace, due = SimulatedWorker(config), TraceWriter(path, scheduler), arrivals()
    number = 0

    def trace_ends(updates: Iterable[RequestUpdate | None]) -> None:
        for update in updates:
            if update is not None and update.status.is_finished:
                trace.end(update.request_id, update.status.value)

    while due or scheduler.requests:
        for requests in due.pop(number, ()):
            scheduler.add(*requests)
        if number == 22:
            trace_ends([scheduler.finish("aborted", RequestStatus.FINISHED_ABORTED)])
        trace_ends(scheduler.expire())
        plan = scheduler.schedule()
        number += 1
        if plan is not None:
            before, now = now, now + seconds_of(plan)
            trace.plan(plan, before, before)
            trace_ends(scheduler.update(worker.step(plan, scheduler.requests)))
            trace.done(now, 0.0)
    trace.close()
    return number
