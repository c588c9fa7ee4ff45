"""Grammar state of each structured answer; token masks are computed in one batch per step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...scheduler.request import Request, RequestStatus
from ...scheduler.scheduler import Scheduler
from ...scheduler.step import RequestUpdate
from ..errors import InputError, RequestError
from ..runner.batch import TokenMasks
from ..utils.cores import num_cores
from .compiler import Grammar, Int32, clear
from .error_messages import TOO_COMPLEX

RENEWABLE = 0.02  # seconds; slower grammars are not compiled again within a step
MAX_RENEWED = 8  # answers per grammar that may read all their tokens again
MAX_THREADS = 4  # run alongside the workers
# Ambiguous grammars take longer with each token. All requests wait for a step's masks, so requests
# that take too long fail.
SLOW_STEP = 0.1  # seconds for all masks of a step; above it, the next masks are timed one by one
MAX_MATCHER_SECONDS = 0.1  # CPU time of one answer per step
MAX_STEP_SECONDS = 1.0  # CPU time of all answers per step


@dataclass(eq=False)
class Matcher:
    """Grammar state of one answer after its first `num_read` output tokens."""

    grammar: Grammar
    request: Request
    allowed: Int32 = field(init=False)  # [words], mask of the next token
    is_done: bool = False  # The answer is complete and cannot continue.
    error: RequestError | None = None  # why the answer cannot continue
    num_read: int = 0  # output tokens
    seconds: float = 0.0  # CPU time in the latest step, if measured

    def __post_init__(self) -> None:
        self.grammar.num_answers += 1
        self._state = self.grammar.template.deep_copy()
        self._is_own = False  # whether the lexer is used by this answer only
        self.allow(self.grammar.first.copy())

    @property
    def state(self) -> Any:
        return self._state

    def allow(self, row: Int32) -> None:
        """Set the mask of the next token to `row`, the tokens that the grammar allows.

        With ignore_eos or before min_tokens, end tokens are removed unless nothing else is left.
        """
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
        """Advance by the new output tokens."""
        start = time.thread_time()
        token_ids = self.request.output_token_ids[self.num_read :]
        self.num_read += len(token_ids)
        is_read = self._state.consume_tokens(list(token_ids))
        self.seconds = time.thread_time() - start
        if (self._state.is_error() or not is_read) and not self.renew():
            return
        self.is_done = bool(self._state.is_stopped())

    def renew(self) -> bool:
        """Recover from an exhausted shared lexer by reading all tokens with a separate one.

        Return whether that succeeded; otherwise set `error`.
        """
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
        """Set `error`: the grammar is too complex to continue."""
        name = f"structured.{self.grammar.form.field}"
        self.error = InputError(name, f"after {self.num_read} tokens it {TOO_COMPLEX}").reason


def _compute_timed(matchers: Sequence[Matcher], rows: Int32) -> None:
    for matcher, row in zip(matchers, rows, strict=True):
        start = time.thread_time()
        matcher.state.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        matcher.seconds += time.thread_time() - start


def _fail_slow(matchers: Sequence[Matcher]) -> None:
    """Fail answers that took too much time of the step, the slowest first."""
    total = sum(matcher.seconds for matcher in matchers)
    for matcher in sorted(matchers, key=lambda each: -each.seconds):
        if matcher.seconds <= MAX_MATCHER_SECONDS and total <= MAX_STEP_SECONDS:
            return
        total -= matcher.seconds
        matcher.grammar.owner.forget(matcher.grammar)
        matcher.fail()


class Matchers:
    """Matchers of all structured answers, by the scheduler's request id."""

    def __init__(self) -> None:
        self._matchers: dict[str, Matcher] = {}
        self._executor: Any = None  # llguidance's threads, created on first use
        self._was_slow = False  # whether the latest masks took over SLOW_STEP

    def add(self, requests: Sequence[Request], grammar: Grammar) -> None:
        for request in requests:
            self._matchers[request.request_id] = Matcher(grammar, request)

    def remove(self, name: str) -> None:
        matcher = self._matchers.pop(name, None)
        if matcher is not None:
            matcher.grammar.owner.trim()

    def read(self, updates: Sequence[RequestUpdate], scheduler: Scheduler) -> list[RequestUpdate]:
        """Advance by a step's tokens, and finish answers that are complete or failed.

        Returns the updates with the status of finished answers replaced.
        """
        if not self._matchers:
            return list(updates)
        continuing = []
        for update in updates:
            matcher = self._matchers.get(update.request_id)
            if matcher is not None and update.new_token_ids and not update.error:
                matcher.read()
                if update.status is RequestStatus.RUNNING and not (
                    matcher.is_done or matcher.error
                ):
                    continuing.append(matcher)
        self._make_masks(continuing)
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
        error = None if matcher.is_done else matcher.error
        scheduler.finish(update.request_id, status, error)
        return update._replace(status=status, error=error)

    def _make_masks(self, matchers: Sequence[Matcher]) -> None:
        """Compute the masks of the next tokens, on several threads without the GIL."""
        if not matchers:
            return
        owner = matchers[0].grammar.owner
        rows = owner.new_rows(len(matchers))
        start = time.perf_counter()
        if len(matchers) == 1 or self._was_slow:
            _compute_timed(matchers, rows)
            _fail_slow(matchers)
        else:
            pairs = [(matcher.state, index) for index, matcher in enumerate(matchers)]
            width = rows.shape[1] * rows.itemsize
            self._threads().unsafe_compute_mask_ptr(pairs, rows.ctypes.data, width, len(rows))
        self._was_slow = time.perf_counter() - start > SLOW_STEP
        for matcher, row in zip(matchers, rows, strict=True):
            matcher.grammar.num_masks += 1
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
                matcher.error = InputError(name, "allows only banned tokens next").reason

    def _threads(self) -> Any:
        if self._executor is None:
            import llguidance

            self._executor = llguidance.LLExecutor(min(MAX_THREADS, num_cores()))
        return self._executor

    def masks(self, sampled: Sequence[Request]) -> TokenMasks | None:
        """Return the masks of the rows that sample, in order; None if no row has a grammar."""
        if not self._matchers:
            return None
        found = [
            (index, self._matchers[request.request_id].allowed)
            for index, request in enumerate(sampled)
            if request.is_guided
        ]
        if not found:
            return None
        rows = np.array([index for index, _ in found], np.int32)
        return TokenMasks(rows, np.stack([row for _, row in found]))
