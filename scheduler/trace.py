"""Writes down what the scheduler did, one JSON line a step: the food of `octavo trace draw`.

The first line holds the limits; each further one is a step:

    step, time (seconds since the first), schedule_ms, run_ms, update_ms
    rows       [{request, start, count, samples}]: tokens [start, start + count) were computed
    started    [{request, cached}]: began or resumed, `cached` tokens found in blocks
    encode     [{request, tokens}]: a unit encoded, with that request's pixels
    preempted, waiting   names; waiting ones in order
    ended      [{request, status}]
    copies, evicted      blocks copied on write; embeddings dropped
    free_blocks, cached_blocks (of the free ones), encoder_tokens

It holds names and counts, never a token or a pixel.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .scheduler import Scheduler
from .step import RequestUpdate, StepPlan

log = logging.getLogger("octavo.scheduler")


class TraceWriter:
    """Records a scheduler's steps to a file, each as soon as it is done."""

    def __init__(self, path: Path, scheduler: Scheduler) -> None:
        """Raises OSError when the file cannot be written."""
        self._scheduler = scheduler
        self._file = path.open("w", buffering=1, encoding="utf-8")
        self._live: set[str] = set()  # requests that were seen and have not ended
        self._running: set[str] = set()  # those of them that have started
        self._began = math.inf  # when the first step did
        self._put({"octavo_trace": 1, **asdict(scheduler.config)})

    def write(
        self, plan: StepPlan, updates: Iterable[RequestUpdate], times: tuple[float, ...]
    ) -> None:
        """A step that is done. `times`: seconds on any clock before and after `schedule`, after
        the workers, and after `update`."""
        before, planned, ran, updated = times
        self._began = min(self._began, before)
        state = self._scheduler.state
        rows = [
            {"request": name, "start": start, "count": count, "samples": samples}
            for name, start, count, samples in zip(
                plan.request_ids,
                plan.num_computed_tokens,
                plan.num_scheduled_tokens,
                plan.samples,
                strict=True,
            )
        ]
        waiting = [request.request_id for request in state.waiting]
        self._put(
            {
                "step": plan.step_id,
                "time": round(before - self._began, 6),
                "schedule_ms": _ms(planned - before),
                "run_ms": _ms(ran - planned),
                "update_ms": _ms(updated - ran),
                "rows": rows,
                "started": self._started(plan),
                "encode": [
                    {"request": each.request_id, "tokens": each.unit.num_tokens}
                    for each in plan.encode
                ],
                "preempted": plan.preempted,
                "waiting": waiting,
                "ended": self._ended({*plan.request_ids, *waiting}, updates),
                "copies": len(plan.copies),
                "evicted": len(plan.drop),
                "free_blocks": state.blocks.num_free,
                "cached_blocks": state.blocks.num_evictable,
                "encoder_tokens": state.encoder_cache.num_tokens,
            }
        )

    def _started(self, plan: StepPlan) -> list[dict[str, Any]]:
        self._running -= set(plan.preempted)
        rows = zip(plan.request_ids, plan.num_computed_tokens, strict=True)
        new = [(name, start) for name, start in rows if name not in self._running]
        self._running |= set(plan.request_ids)
        return [{"request": name, "cached": start} for name, start in new]

    def _ended(self, seen: set[str], updates: Iterable[RequestUpdate]) -> list[dict[str, str]]:
        """Those that an update says have ended, and those that are gone: they were aborted."""
        told = {u.request_id: u.status.value for u in updates if u.status.is_finished}
        gone = (self._live | seen).difference(self._scheduler.requests)
        self._live = (self._live | seen) - gone
        self._running -= gone
        return [{"request": name, "status": told.get(name, "abort")} for name in sorted(gone)]

    def _put(self, record: dict[str, Any]) -> None:
        """A disk that is full ends the record, not the engine."""
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            log.warning("%s: no more steps are recorded: %s", self._file.name, error.strerror)
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing writes what is left
            self._file.close()


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
