"""Where the answers that have a form are in it: their masks are made once a step, all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..scheduler.request import Request, RequestStatus
from ..scheduler.scheduler import Scheduler
from ..scheduler.step import RequestUpdate
from .cores import num_cores
from .grammar import Grammar, Matcher
from .runner.batch import TokenMasks

MAX_THREADS = 4  # they run beside the workers


class Matchers:
    """By the scheduler's names of the answers."""

    def __init__(self) -> None:
        self._matchers: dict[str, Matcher] = {}
        self._executor: Any = None  # threads, once they are needed

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
        if len(matchers) == 1:
            matchers[0].state.unsafe_compute_mask_ptr(rows.ctypes.data, rows.nbytes)
        else:
            pairs = [(matcher.state, index) for index, matcher in enumerate(matchers)]
            width = rows.shape[1] * rows.itemsize
            self._threads().unsafe_compute_mask_ptr(pairs, rows.ctypes.data, width, len(rows))
        for matcher, row in zip(matchers, rows, strict=True):
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
