"""Where the answers that have a form are in it: their masks are made once a step, all together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...scheduler.request import Request, RequestStatus
from ...scheduler.scheduler import Scheduler
from ...scheduler.step import RequestUpdate
from ..runner.batch import TokenMasks
from ..utils.cores import num_cores
from .compiler import Grammar, Int32, clear
from .error_messages import TOO_COMPLEX

RENEWABLE = 0.02  # seconds: one that took longer to compile is not compiled again within a step
MAX_RENEWED = 8  # answers of one grammar whose tokens are read again: that is work in a step
MAX_THREADS = 4  # they run beside the workers
# An ambiguous grammar takes longer with each token. Every request waits for a step's masks, so a
# request that takes too much of it fails.
SLOW_STEP = 0.1  # seconds for all masks of a step
MAX_MATCHER_SECONDS = 0.1  # CPU time of one request's part of a step
MAX_STEP_SECONDS = 1.0  # CPU time of all of them together


@dataclass(eq=False)
class Matcher:
    """One answer's place in its grammar: after all tokens that it has read."""

    grammar: Grammar
    request: Request
    allowed: Int32 = field(init=False)  # [words] what may come next
    is_done: bool = False  # nothing can follow
    error: str = ""  # why it cannot go on
    num_read: int = 0  # tokens of the output
    seconds: float = 0.0  # CPU time of its part of the latest step, where that was measured

    def __post_init__(self) -> None:
        self.grammar.num_answers += 1
        self._state = self.grammar.template.deep_copy()
        self._is_own = False  # its lexer is shared with no other answer
        self.allow(self.grammar.first.copy())

    @property
    def state(self) -> Any:
        return self._state

    def allow(self, row: Int32) -> None:
        """`row`: what its grammar allows. End tokens are held back where they are not to end the
        output, as long as anything else is left."""
        params = self.request.params
        held = list(self.grammar.owner.end_token_ids) if params.ignore_eos else []
        if self.num_read < params.min_tokens:
            size = self.grammar.owner.vocab_size
            held += [token for token in self.request.stop_token_ids if token < size]
        self.allowed = row
        if held:
            rest = row.copy()
            clear(rest, held)
            self.allowed = rest if rest.any() else row

    def read(self) -> None:
        """Take in the tokens that the output has gained."""
        begun = time.thread_time()
        token_ids = self.request.output_token_ids[self.num_read :]
        self.num_read += len(token_ids)
        is_read = self._state.consume_tokens(list(token_ids))
        self.seconds = time.thread_time() - begun
        if (self._state.is_error() or not is_read) and not self.renew():
            return
        self.is_done = bool(self._state.is_stopped())

    def renew(self) -> bool:
        """Recover from an error where the answers of a grammar share a lexer whose limits are used
        up: read all tokens again with a separate one. Return whether that helped; else set
        `error`."""
        grammar = self.grammar
        grammar.owner.forget(grammar)
        is_shared = not self._is_own and grammar.num_answers > 1
        if is_shared and grammar.seconds < RENEWABLE and grammar.num_renewed < MAX_RENEWED:
            self._is_own = True
            grammar.num_renewed += 1
            self._state = grammar.owner.new_matcher(grammar.text)
            output = list(self.request.output_token_ids[: self.num_read])
            if self._state.consume_tokens(output) and not self._state.is_error():
                return True
        self.fail()
        return False

    def fail(self) -> None:
        """Set `error`: the grammar is too complex to go on."""
        name = f"structured.{self.grammar.form.field}"
        self.error = f"INVALID_ARGUMENT: {name}: after {self.num_read} tokens it {TOO_COMPLEX}"


def _compute_timed(matchers: Sequence[Matcher], rows: Int32) -> None:
    for matcher, row in zip(matchers, rows, strict=True):
        begun = time.thread_time()
        matcher.state.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        matcher.seconds += time.thread_time() - begun


def _fail_slow(matchers: Sequence[Matcher]) -> None:
    """Fail requests whose part of the step took too long, the slowest first."""
    total = sum(matcher.seconds for matcher in matchers)
    for matcher in sorted(matchers, key=lambda each: -each.seconds):
        if matcher.seconds <= MAX_MATCHER_SECONDS and total <= MAX_STEP_SECONDS:
            return
        total -= matcher.seconds
        matcher.grammar.owner.forget(matcher.grammar)
        matcher.fail()


class Matchers:
    """By the scheduler's names of the answers."""

    def __init__(self) -> None:
        self._matchers: dict[str, Matcher] = {}
        self._executor: Any = None  # threads, once they are needed
        self._was_slow = False  # the latest masks: the next ones are made and timed one by one

    def add(self, requests: Sequence[Request], grammar: Grammar) -> None:
        for request in requests:
            self._matchers[request.request_id] = Matcher(grammar, request)

    def remove(self, name: str) -> None:
        self._matchers.pop(name, None)

    def read(self, updates: Sequence[RequestUpdate], scheduler: Scheduler) -> list[RequestUpdate]:
        """Takes in a step's tokens, and ends answers that are complete, or whose form cannot be
        followed any more. The updates, with these ends."""
        if not self._matchers:
            return list(updates)
        going_on = []
        for update in updates:
            matcher = self._matchers.get(update.request_id)
            if matcher is not None and update.new_token_ids and not update.error:
                matcher.read()
                if update.status is RequestStatus.RUNNING and not (
                    matcher.is_done or matcher.error
                ):
                    going_on.append(matcher)
        self._make_masks(going_on)
        return [self._ended(update, scheduler) for update in updates]

    def _ended(self, update: RequestUpdate, scheduler: Scheduler) -> RequestUpdate:
        matcher = self._matchers.get(update.request_id)
        is_open = update.status in (RequestStatus.RUNNING, RequestStatus.FINISHED_LENGTH)
        if matcher is None or not is_open:
            return update
        status = update.status
        if matcher.is_done:
            status = RequestStatus.FINISHED_STOPPED
        elif matcher.error and status is RequestStatus.RUNNING:
            status = RequestStatus.FINISHED_ERROR
        if status is update.status:
            return update
        error = "" if matcher.is_done else matcher.error
        scheduler.finish(update.request_id, status, error)
        return update._replace(status=status, error=error)

    def _make_masks(self, matchers: Sequence[Matcher]) -> None:
        """What may come next in each, on several threads without Python's lock."""
        if not matchers:
            return
        owner = matchers[0].grammar.owner
        rows = owner.new_rows(len(matchers))
        begun = time.perf_counter()
        if len(matchers) == 1 or self._was_slow:
            _compute_timed(matchers, rows)
            _fail_slow(matchers)
        else:
            pairs = [(matcher.state, index) for index, matcher in enumerate(matchers)]
            width = rows.shape[1] * rows.itemsize
            self._threads().unsafe_compute_mask_ptr(pairs, rows.ctypes.data, width, len(rows))
        self._was_slow = time.perf_counter() - begun > SLOW_STEP
        for matcher, row in zip(matchers, rows, strict=True):
            if matcher.error:
                continue
            if matcher.state.is_error():
                if not matcher.renew():
                    continue
                matcher.state.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
                if matcher.state.is_error() and not matcher.renew():
                    continue
            found = owner.cut(row)
            if found.any():
                matcher.allow(found)
            else:
                name = f"structured.{matcher.grammar.form.field}"
                matcher.error = f"INVALID_ARGUMENT: {name}: only banned tokens may come next"

    def _threads(self) -> Any:
        if self._executor is None:
            import llguidance

            self._executor = llguidance.LLExecutor(min(MAX_THREADS, num_cores()))
        return self._executor

    def masks(self, drawn: Sequence[Request]) -> TokenMasks | None:
        """Of rows that sample, in order; None where no row has a form."""
        if not self._matchers:
            return None
        found = [
            (place, self._matchers[request.request_id].allowed)
            for place, request in enumerate(drawn)
            if request.is_guided
        ]
        if not found:
            return None
        places = np.array([place for place, _ in found], np.int32)
        return TokenMasks(places, np.stack([row for _, row in found]))
