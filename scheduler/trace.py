"""Scheduler trace: one JSON line per step, the input of `octavo trace draw`.

The first line holds the scheduler's limits. Each further line is one step:

    step, time (start, in seconds after the first step's), schedule_ms, run_ms, update_ms
    rows       [{request, start, count, samples}]: tokens [start, start + count) were computed
    started    [{request, cached}]: started or resumed, with `cached` tokens from the prefix cache
    encode     [{request, tokens}]: a unit encoded with that request's pixels
    preempted  request names; idle: running requests without a row
    waiting    the first 256 names in queue order after planning; num_waiting: their total number
    ended      [{request, status}] since the previous line: stop, length, abort or error
    copies, evicted      blocks copied on write; embeddings evicted
    free_blocks, cached_blocks (subset of the free ones), encoder_tokens

A trace contains names and counts, never tokens or pixels.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .request import Request
from .scheduler import Scheduler
from .step import StepPlan

log = logging.getLogger("octavo.scheduler")

MAX_WAITING, MAX_NAME = 256, 64


class TraceWriter:
    """Write a scheduler's steps to a file, each when its result has been processed."""

    def __init__(self, path: Path | str, scheduler: Scheduler) -> None:
        """Truncate the file at `path`. Raises OSError if it cannot be opened."""
        self._scheduler = scheduler
        self._file = Path(path).open("w", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._running: set[str] = set()  # requests that have started
        self._ended: list[dict[str, str]] = []  # since the last step
        self._gone: set[str] = set()  # names of `_ended`, until the next plan
        # steps in flight, and the request of each row
        self._planned: deque[tuple[dict[str, Any], list[Request | None]]] = deque()
        self._latest = 0  # id of the latest planned step
        self._free_at = -math.inf  # end of the latest finished step, the earliest start of the next
        self._began = math.inf  # start of the first step
        self._put({"octavo_trace": 1, **asdict(scheduler.config)})

    def end(self, request_id: str, status: str) -> None:
        """Record that a request has ended, in the line of the step written next."""
        self._ended.append({"request": _cut(request_id), "status": status})
        self._gone.add(request_id)

    def plan(self, plan: StepPlan, before: float, planned: float) -> None:
        """Record a planned step; `before` and `planned` are seconds on any clock."""
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
        self._latest = plan.step_id
        rowed = set(plan.request_ids)
        requests = [self._scheduler.requests.get(name) for name in plan.request_ids]
        record = {
            "step": plan.step_id,
            "time": planned,
            "schedule_ms": _ms(planned - before),
            "run_ms": 0.0,
            "update_ms": 0.0,
            "rows": rows,
            "started": self._started(plan),
            "encode": [
                {"request": _cut(each.request_id), "tokens": each.unit.num_tokens}
                for each in plan.encode
            ],
            "preempted": [_cut(name) for name in plan.preempted],
            "idle": [_cut(r.request_id) for r in state.running if r.request_id not in rowed],
            "waiting": [_cut(r.request_id) for r in state.waiting[:MAX_WAITING]],
            "num_waiting": len(state.waiting),
            "ended": [],
            "copies": len(plan.copies),
            "evicted": len(plan.drop),
            "free_blocks": state.blocks.num_free,
            "cached_blocks": state.blocks.num_evictable,
            "encoder_tokens": state.encoder_cache.num_tokens,
        }
        self._planned.append((record, requests))

    def done(self, ran: float, update_seconds: float) -> None:
        """Write the oldest planned step.

        `ran` is the time at which it finished; `update_seconds` is how long its update took.
        """
        record, _ = self._planned.popleft()
        began = max(record["time"], self._free_at)
        ran = max(ran, began)  # two results may be seen in either order
        self._began, self._free_at = min(self._began, began), ran
        record["time"] = round(began - self._began, 6)
        record["run_ms"], record["update_ms"] = _ms(ran - began), _ms(update_seconds)
        record["ended"], self._ended = self._ended, []
        self._put(record)
        # Results of steps in flight are discarded for requests that have ended.
        for later, requests in self._planned:
            kept = [i for i, r in enumerate(requests) if r is None or not r.status.is_finished]
            later["rows"] = [later["rows"][i] for i in kept]
            requests[:] = [requests[i] for i in kept]

    def reset_after_worker_restart(self) -> None:
        """Drop planned steps; running requests are recorded as started again."""
        self._planned.clear()
        self._running.clear()

    def _started(self, plan: StepPlan) -> list[dict[str, Any]]:
        self._running -= set(plan.preempted) | self._gone
        self._gone.clear()
        rows = zip(plan.request_ids, plan.num_computed_tokens, strict=True)
        new = [(name, start) for name, start in rows if name not in self._running]
        self._running |= set(plan.request_ids)
        return [{"request": _cut(name), "cached": start} for name, start in new]

    def _put(self, record: dict[str, Any]) -> None:
        """Write one line. An I/O error, such as a full disk, stops the trace only."""
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            log.warning("%s: scheduler trace stopped: %s", self._file.name, error.strerror)
            with contextlib.suppress(OSError):  # closing flushes the buffer
                self._file.close()

    def close(self) -> None:
        """Close the file, after a last line for requests that ended since the last step."""
        if self._ended:
            self._planned.clear()
            now = max(self._free_at, 0.0)
            self.plan(StepPlan(self._latest + 1, (), (), (), (), ()), now, now)
            self.done(now, 0.0)
        with contextlib.suppress(OSError):
            self._file.close()


def _cut(name: str) -> str:
    """Return a client-chosen name shortened to about MAX_NAME characters."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2]}…{name[-MAX_NAME // 2 :]}"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
