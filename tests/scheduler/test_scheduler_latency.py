"""What a step of the scheduler costs, in calls and bytes rather than seconds."""

import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

from octavo.benchmarks.scheduler_latency import filled, run, step
from octavo.scheduler.scheduler import Scheduler

NUM_REQUESTS = 24


def decoding(prompt_len: int, num_requests: int = NUM_REQUESTS) -> Scheduler:
    scheduler = filled(num_requests, prompt_len)
    while step(scheduler)[0].num_tokens != num_requests:
        pass
    for _ in range(16 - prompt_len % 16 + 16):  # to the same place in a block
        step(scheduler)
    return scheduler


def calls_of(work: Callable[[], Any], kinds: tuple[str, ...] = ("call", "c_call")) -> int:
    """Function calls: "call" are Python's, "c_call" C's."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in kinds

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def sixteen_steps(scheduler: Scheduler) -> None:
    """Each request seals a block and gets another."""
    for _ in range(16):
        step(scheduler)


def test_a_step_calls_as_much_after_a_long_prompt_as_after_a_short_one() -> None:
    short, long = (calls_of(partial(sixteen_steps, decoding(n))) for n in (32, 16384))
    assert abs(short - long) < 0.01 * short  # Python's own housekeeping calls now and then
    assert short / 16 / NUM_REQUESTS < 30  # calls of a row, sealing its blocks included


def test_calls_a_request_at_many_requests() -> None:
    some, more = (
        calls_of(partial(sixteen_steps, decoding(32, count)), ("call",)) for count in (64, 128)
    )
    assert some / 16 / 64 < 10
    assert more < 2.05 * some  # no worse than in proportion


def test_a_step_copies_as_little_after_a_long_prompt_as_after_a_short_one() -> None:
    """The most that is allocated over what stays: not a token of the prompt is copied."""
    peaks = []
    for prompt_len in (32, 16384):
        scheduler = decoding(prompt_len)
        step(scheduler)  # its arrays have just grown
        tracemalloc.start()
        step(scheduler)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 4096


def test_the_report_states_both_calls() -> None:
    report = run(3, 20)
    assert set(report.as_dict()) == {"schedule_ms", "update_ms"}
    assert "3 requests decode after prompts of 20 tokens" in report.as_text()
