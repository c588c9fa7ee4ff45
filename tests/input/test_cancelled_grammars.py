"""Requests that are cancelled while their grammar is compiled leave nothing in the queue."""

from __future__ import annotations

import threading
from typing import Any

import octavo
from octavo.benchmarks.fakes.tiny_server import wait_for
from octavo.engine.input.parsed_prompt import ParsedPrompt
from octavo.engine.input.preprocess_pool import MAX_SLOW_GRAMMARS, InputPool

FORM = octavo.SamplingParams(structured=octavo.StructuredOutput(regex="[ab]*"))


class Grammars:
    """Every grammar is slow, and its request is cancelled before that is known."""

    def __init__(self) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()

    def compile_quickly(self, form: Any, task: Any) -> None:
        self.started.set()
        assert self.go_on.wait(20)

    def compile_slowly(self, form: Any, task: Any) -> None:
        raise AssertionError("a cancelled request's grammar is compiled")


def test_cancelled_requests_leave_the_queue_of_slow_grammars() -> None:
    processor: Any = None
    grammars: Any = Grammars()
    pool = InputPool(processor, grammars=grammars)
    for _ in range(MAX_SLOW_GRAMMARS + 1):
        grammars.started.clear(), grammars.go_on.clear()
        job = pool.submit(ParsedPrompt("a prompt"), FORM)
        assert grammars.started.wait(20)
        job.cancel()
        grammars.go_on.set()
        for lane in ("grammars", "slow_grammars"):
            wait_for(lambda lane=lane: pool._threads[lane]._num_unfinished == 0)
    assert not pool._slow_jobs and not pool._jobs
