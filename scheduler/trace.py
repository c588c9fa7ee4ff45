"""Writes down what the scheduler did, one JSON line a step: the food of `octavo trace draw`.

The first line holds the limits; each further one is a step:

    step, time (seconds since the first), schedule_ms, run_ms, update_ms
    rows       [{request, start, count, samples}]: tokens [start, start + count) were computed
    started    [{request, cached}]: began or resumed, `cached` tokens found in blocks
    encode     [{request, tokens}]: a unit encoded, with that request's pixels
    preempted  names; idle: that run and had no row
    waiting    names in order once the step was done, the first 256; num_waiting: of all
    ended      [{request, status}]: stop, length, abort or error, since the line before
    copies, evicted      blocks copied on write; embeddings dropped
    free_blocks, cached_blocks (of the free ones), encoder_tokens

It holds names and counts, never a token or a pixel.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .scheduler import Scheduler
from .step import StepPlan

log = logging.getLogger("octavo.scheduler")

MOST_WAITING, MOST_NAME = 256, 64


class TraceWriter:
    """Records a scheduler's steps to a file, each as soon as it is done."""

    def __init__(self, path: Path | str, scheduler: Scheduler) -> None:
        """What was in the file is lost. Raises OSError when it cannot be opened."""
        self._scheduler = scheduler
        self._file = Path(path).open("w", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._running: set[str] = set()  # requests that have started
        self._ended: list[dict[str, str]] = []  # since the last step
        self._gone: set[str] = set()  # their names
        self._last = (0, 0.0)  # the latest step, and when it was done
        self._began = math.inf  # when the first step did
        self._put({"octavo_trace": 1, **asdict(scheduler.config)})

    def end(self, request_id: str, status: str) -> None:
        """A request has ended: for the line of the step that is written next."""
        self._ended.append({"request": _cut(request_id), "status": status})
        self._gone.add(request_id)

    def write(self, plan: StepPlan, times: tuple[float, ...]) -> None:
        """A step that is done. `times`: seconds on any clock before and after `schedule`, after
        the workers, and after `update`."""
        before, planned, ran, updated = times
        self._began = min(self._began, before)
        state = self._scheduler.state
        rows = [
            {"request": _cut(name), "start": start, "count": count, "samples": samples}
            for name, start, count, samples in zip(
                plan.request_ids,
                plan.num_computed_tokens,
                plan.num_scheduled_tokens,
                plan.samples,
                strict=True,
            )
        ]
        self._last = (plan.step_id, updated)
        rowed = set(plan.request_ids)
        started = self._started(plan)
        ended, self._ended = self._ended, []
        self._put(
            {
                "step": plan.step_id,
                "time": round(before - self._began, 6),
                "schedule_ms": _ms(planned - before),
                "run_ms": _ms(ran - planned),
                "update_ms": _ms(updated - ran),
                "rows": rows,
                "started": started,
                "encode": [
                    {"request": _cut(each.request_id), "tokens": each.unit.num_tokens}
                    for each in plan.encode
                ],
                "preempted": [_cut(name) for name in plan.preempted],
                "idle": [_cut(r.request_id) for r in state.running if r.request_id not in rowed],
                "waiting": [_cut(r.request_id) for r in state.waiting[:MOST_WAITING]],
                "num_waiting": len(state.waiting),
                "ended": ended,
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
        self._running -= self._gone
        self._gone.clear()
        return [{"request": _cut(name), "cached": start} for name, start in new]

    def _put(self, record: dict[str, Any]) -> None:
        """A disk that is full ends the record, not the engine."""
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            log.warning("%s: no more steps are recorded: %s", self._file.name, error.strerror)
            with contextlib.suppress(OSError):  # closing writes what is left
                self._file.close()

    def close(self) -> None:
        """Ends that no step followed get a line without one."""
        if self._ended:
            step_id, now = self._last
            self.write(StepPlan(step_id + 1, (), (), (), (), ()), (now,) * 4)
        with contextlib.suppress(OSError):
            self._file.close()


def _cut(name: str) -> str:
    """A client's name is never long here."""
    return name if len(name) <= MOST_NAME else f"{name[: MOST_NAME // 2]}…{name[-MOST_NAME // 2 :]}"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
