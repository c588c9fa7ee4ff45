"""Decides what runs in each step.

One rule: every request's `num_computed_tokens` catches up with its `num_tokens`, oldest request
first, as far as the step's token budget, the blocks and the encode budget allow. Prefill, chunked
prefill, decoding and resuming after preemption are that same line.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from .block_manager import BlockManager
from .encoder_cache import EncoderCache
from .request import EncodeUnit, Request, RequestStatus, UnitKey
from .step import EncodePlan, RequestUpdate, StepPlan, StepResult

MAX_MISSES = 3  # times a request's embedding may be missing before the request fails


class AdmissionError(ValueError):
    """A request that could never run here; the text names the limit."""


@dataclass(frozen=True)
class SchedulerConfig:
    num_blocks: int
    block_size: int
    max_num_seqs: int  # requests that run at once
    max_num_batched_tokens: int  # tokens of one step
    max_model_len: int  # tokens of prompt and output
    max_encode_tokens: int  # image tokens encoded in one step
    encoder_cache_tokens: int  # image tokens whose embeddings workers keep
    max_empty_steps: int = 100  # steps in which nothing could run before the head fails

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclass
class _Draft:
    """A step plan in the making."""

    token_budget: int
    encoder_budget: int
    rows: list[tuple[Request, int]] = field(default_factory=list)  # and num_scheduled_tokens
    encode: list[EncodePlan] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)


class Scheduler:
    """Owns every request from `add` until it is finished. Not thread-safe."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.encoder_cache = EncoderCache(config.encoder_cache_tokens)
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()  # in order of arrival
        self.running: list[Request] = []  # in order of arrival
        self._misses: dict[str, int] = {}
        self._step_ids = itertools.count(1)
        self._arrivals = itertools.count()
        self._num_empty_steps = 0

    def add(self, request: Request) -> None:
        """Admits a request. Raises `AdmissionError` for what could never run."""
        if request.request_id in self.requests:
            raise AdmissionError(f"request_id={request.request_id!r}: in use")
        self._check_size(request)
        asked = request.params.max_tokens
        room = self._max_len - request.num_prompt_tokens
        request.max_tokens = min(asked if asked is not None else room, room)
        request.arrival = next(self._arrivals)
        self.requests[request.request_id] = request
        self.waiting.append(request)

    @property
    def _max_len(self) -> int:
        """Tokens of the longest request: what the model takes and the blocks hold."""
        return min(self.config.max_model_len, self.config.num_blocks * self.config.block_size)

    def _check_size(self, request: Request) -> None:
        count = request.num_prompt_tokens
        if count == 0:
            raise AdmissionError("prompt: has no tokens")
        if count >= self._max_len:
            raise AdmissionError(
                f"prompt: {count} tokens leave no room for output; max_model_len is {self._max_len}"
            )
        for limit in ("max_encode_tokens", "encoder_cache_tokens"):
            most = max((unit.num_tokens for unit in request.units), default=0)
            if most > getattr(self.config, limit):
                raise AdmissionError(
                    f"an image or video unit of {most} tokens is over {limit}="
                    f"{getattr(self.config, limit)}; lower its max_pixels"
                )

    def schedule(self) -> StepPlan | None:
        """The next step; None when there is no request. `update` must follow each plan."""
        if not self.requests:
            return None
        draft = _Draft(self.config.max_num_batched_tokens, self.config.max_encode_tokens)
        for request in tuple(self.running):
            if request.status is RequestStatus.RUNNING:  # else it was preempted in this loop
                self._schedule_running(request, draft)
        if not draft.preempted:
            while self.waiting and self._start_next(draft):
                pass
        return self._plan(draft)

    def _schedule_running(self, request: Request, draft: _Draft) -> None:
        """Plans a running request's next tokens, preempting the newest when blocks run out."""
        count = self._num_schedulable(request, draft)
        if count == 0:
            return
        while not self.blocks.grow(request.block_table, request.num_computed_tokens + count):
            victim = self.running[-1]  # not older than `request`, so not in the draft yet
            self._preempt(victim)
            draft.preempted.append(victim.request_id)
            if victim is request:
                return
        self._commit(request, count, draft)

    def _start_next(self, draft: _Draft) -> bool:
        """Moves the head of `waiting` to `running` if this step can begin it."""
        request = self.waiting[0]
        if len(self.running) >= self.config.max_num_seqs:
            return False
        # Room for all its tokens and not for the first chunk alone, so that requests do not start
        # only to preempt each other.
        if self.blocks.num_free < self.blocks.num_needed(request.num_tokens):
            return False
        count = self._num_schedulable(request, draft)
        if count == 0:
            return False
        self.blocks.grow(request.block_table, count)
        self.waiting.popleft()
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        self._commit(request, count, draft)
        return True

    def _num_schedulable(self, request: Request, draft: _Draft) -> int:
        """Tokens that budgets allow, cut before the first unit that cannot be encoded now."""
        start = request.num_computed_tokens
        count = min(request.num_tokens - start, draft.token_budget)
        budget, room = draft.encoder_budget, self.encoder_cache.room()
        for unit in overlapping(request.units, start, start + count):
            if unit.key not in self.encoder_cache:
                budget -= unit.num_tokens
            room -= self.encoder_cache.held_tokens(unit)
            if budget < 0 or room < 0:
                return max(0, unit.offset - start)
        return count

    def _commit(self, request: Request, count: int, draft: _Draft) -> None:
        """Puts a row in the draft; its units are held from now on."""
        start = request.num_computed_tokens
        units = overlapping(request.units, start, start + count)
        # What is cached is held first, so that what is new cannot evict it.
        for unit in sorted(units, key=lambda unit: unit.key not in self.encoder_cache):
            if self.encoder_cache.hold(unit, request.request_id):
                draft.encode.append(EncodePlan(unit, request.request_id))
                draft.encoder_budget -= unit.num_tokens
        draft.token_budget -= count
        draft.rows.append((request, count))

    def _plan(self, draft: _Draft) -> StepPlan:
        rows = draft.rows
        return StepPlan(
            step_id=next(self._step_ids),
            request_ids=tuple(request.request_id for request, _ in rows),
            num_computed_tokens=tuple(request.num_computed_tokens for request, _ in rows),
            num_scheduled_tokens=tuple(count for _, count in rows),
            block_tables=tuple(request.block_table for request, _ in rows),
            samples=tuple(r.num_computed_tokens + count == r.num_tokens for r, count in rows),
            encode=tuple(draft.encode),
            drop=self.encoder_cache.take_evicted(),
            preempted=tuple(draft.preempted),
        )

    def _preempt(self, request: Request) -> None:
        """Takes a request's blocks; when it resumes, the tokens it has are computed anew."""
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(request)

    def update(self, plan: StepPlan, result: StepResult) -> tuple[RequestUpdate, ...]:
        """Takes in what a step computed; one update for each request that it changed visibly."""
        missing = set(result.missing)
        for key in missing:
            self.encoder_cache.lose(key)
        sampled = iter(result.sampled)
        updates = []
        for row, request_id in enumerate(plan.request_ids):
            token = next(sampled, -1) if plan.samples[row] else None
            request = self.requests.get(request_id)
            if request is None:  # finished since the plan was made
                continue
            error = result.errors.get(request_id, "")
            update = self._update_row(request, plan, row, token, missing, error)
            if update is not None:
                updates.append(update)
        updates.extend(self._watch(plan))
        return tuple(updates)

    def _update_row(
        self,
        request: Request,
        plan: StepPlan,
        row: int,
        token: int | None,
        missing: set[UnitKey],
        error: str,
    ) -> RequestUpdate | None:
        start = plan.num_computed_tokens[row]
        end = start + plan.num_scheduled_tokens[row]
        units = tuple(overlapping(request.units, start, end))
        if error:
            return self.finish(request.request_id, RequestStatus.FINISHED_ERROR, error)
        if missing and any(unit.key in missing for unit in units):
            return self._missed(request)
        request.num_computed_tokens = end
        for unit in units:
            if unit.end <= end:
                self.encoder_cache.release(unit.key, request.request_id)
        return None if token is None else self._append(request, token)

    def _missed(self, request: Request) -> RequestUpdate | None:
        """Its row computed nothing: the next plan encodes what was missing."""
        count = self._misses[request.request_id] = self._misses.get(request.request_id, 0) + 1
        if count < MAX_MISSES:
            return None
        text = f"an image's embedding was missing in {count} steps"
        return self.finish(request.request_id, RequestStatus.FINISHED_ERROR, text)

    def _append(self, request: Request, token: int) -> RequestUpdate | None:
        if token < 0:
            text = "the step gave no token"
            return self.finish(request.request_id, RequestStatus.FINISHED_ERROR, text)
        request.token_ids.append(token)
        status = request.status
        if token in request.stop_token_ids:
            status = RequestStatus.FINISHED_STOPPED
        elif request.num_output_tokens >= request.max_tokens:
            status = RequestStatus.FINISHED_LENGTH
        if status.is_finished:
            self.finish(request.request_id, status)
        return RequestUpdate(request.request_id, (token,), status)

    def _watch(self, plan: StepPlan) -> Iterator[RequestUpdate]:
        """Fails the head when nothing has run for many steps; that should never happen, and if it
        does it must not be silent."""
        if plan.request_ids or plan.encode or not self.requests:
            self._num_empty_steps = 0
            return
        self._num_empty_steps += 1
        if self._num_empty_steps < self.config.max_empty_steps:
            return
        self._num_empty_steps = 0
        head = (self.running or self.waiting)[0]
        text = f"RESOURCE_EXHAUSTED: nothing could run in {self.config.max_empty_steps} steps"
        update = self.finish(head.request_id, RequestStatus.FINISHED_ERROR, text)
        if update is not None:
            yield update

    def finish(
        self, request_id: str, status: RequestStatus, error: str = ""
    ) -> RequestUpdate | None:
        """Ends a request and frees what it holds; None when it is not here."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)
        self._misses.pop(request_id, None)
        request.status, request.error = status, error
        return RequestUpdate(request_id, (), status, error)

    def _release(self, request: Request) -> None:
        self.blocks.free(request.block_table)
        for unit in request.units:
            self.encoder_cache.release(unit.key, request.request_id)

    def check_integrity(self) -> None:
        """Every block and every held embedding belongs to a running request. Tests call it last."""
        tables: list[array[int]] = [request.block_table for request in self.running]
        self.blocks.check_integrity(tables)
        held = {
            request.request_id: {
                unit.key for unit in request.units if unit.end > request.num_computed_tokens
            }
            for request in self.running
        }
        self.encoder_cache.check_integrity(held)
        everyone = {request.request_id for request in (*self.running, *self.waiting)}
        assert everyone == self.requests.keys()
        assert not any(request.block_table for request in self.waiting)
        arrivals = [request.arrival for request in self.running]
        assert arrivals == sorted(arrivals)


def overlapping(units: tuple[EncodeUnit, ...], start: int, end: int) -> Iterator[EncodeUnit]:
    """The units that have a token in [start, end), in order; `units` are disjoint and sorted."""
    for index in range(bisect_right(units, start, key=lambda unit: unit.end), len(units)):
        if units[index].offset >= end:
            return
        yield units[index]
