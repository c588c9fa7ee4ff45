"""Continuous-batching scheduler: decides what runs in each step.

Planning: every request's `num_computed_tokens` catches up with its `num_tokens`, within the
step's token budget, the free blocks and the encode budget. Prefill, chunked prefill, prefix-cache
hits, forks, decoding and resuming after preemption are all instances of this rule.

Order: a request's urgency is its arrival time plus `priority_ageing_s` per priority level. It
never changes, so a waiting request runs before all that arrive late enough, whatever their
priority. Requests are planned in this order and preempted in the reverse order.

`state.py` holds the queues and `planner.py` builds the step plans. This module admits requests,
processes step results and ends requests.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

from .admission import SchedulerConfig, check_queue, check_size
from .block_hash import block_hash
from .errors import AdmissionError, RequestError
from .logprobs import TokenLogprobs
from .planner import Planner
from .request import Request, RequestStatus, UnitKey, overlapping
from .state import InFlight, SchedulerState
from .step import RequestUpdate, StepPlan, StepResult

MAX_MISSES = 3  # consecutive steps without a needed embedding until the request fails
RUNNING = RequestStatus.RUNNING

Updates = Sequence[RequestUpdate]


class Scheduler:
    """Owner of every request from `add` until it is finished. Not thread-safe."""

    def __init__(
        self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create a scheduler; `clock` returns seconds for deadlines and ageing."""
        self.config, self.clock = config, clock
        self.state = SchedulerState(config)
        self.requests, self.blocks = self.state.requests, self.state.blocks
        self.waiting, self.running = self.state.waiting, self.state.running
        self.encoder_cache = self.state.encoder_cache
        self._planner = Planner(self.state)
        self._step_ids = itertools.count(1)
        self._arrivals = itertools.count()
        self._num_empty_steps = 0

    def add(self, request: Request, *forks: Request) -> None:
        """Admit a request and `forks` of it: requests with the same prompt that share its blocks.

        They count as one request in the waiting queue. Raises `AdmissionError` if the request can
        never run, `QueueFull` if it may be retried later.
        """
        for each in (request, *forks):
            if each.request_id in self.requests:
                text = f"request_id={each.request_id!r}: already in use; choose another"
                raise AdmissionError(text, "request_id")
        check_size(request, self.config)
        queued = (self.state.num_queued, self.state.num_queued_tokens)
        check_queue(request, *queued, len(self.running), self.config)
        requested = request.params.max_tokens
        available = self.config.max_request_len - request.num_prompt_tokens
        due = self.clock() + request.priority * self.config.priority_ageing_s
        for each in (request, *forks):
            each.parent = None if each is request else request
            each.max_tokens = min(available if requested is None else requested, available)
            each.urgency = (due, next(self._arrivals))
            self.state.add(each)

    def expire(self) -> list[RequestUpdate]:
        """End all requests whose deadline has passed. Call it before each `schedule`."""
        ended: list[RequestUpdate] = []
        for request in self.state.take_expired(self.clock()):
            done = request.num_output_tokens
            error = RequestError("DEADLINE_EXCEEDED", f"timed out after {done} output tokens")
            ended.append(self._end(request, RequestStatus.FINISHED_ERROR, error))
        return ended

    def schedule(self) -> StepPlan | None:
        """Return the next step's plan.

        Returns None if there are no requests, or if all of them await the step in flight. At most
        one step may be in flight when the next is planned; call `update` for each, in order.
        """
        in_flight = self.state.in_flight
        assert len(in_flight) <= 1, "two steps are in flight"
        if not self.requests or (in_flight and self.state.suspects):  # suspects run alone
            return None
        draft = self._planner.plan()
        if in_flight and draft.is_empty:
            return None
        plan = draft.as_plan(next(self._step_ids), self.encoder_cache.take_evicted())
        in_flight.append(InFlight(plan, [*draft.rows]))
        return plan

    def update(self, result: StepResult) -> list[RequestUpdate]:
        """Process the result of the oldest step in flight.

        Returns an update for each request that got a token or ended.
        """
        step = self.state.in_flight.popleft()
        plan = step.plan
        assert result.step_id == plan.step_id, "result of another step"
        missing, errors = set(result.missing), result.errors
        for key in missing:
            self.state.lose_embedding(key)
        sampled = iter(result.sampled)
        updates: list[RequestUpdate] = []
        rows = zip(
            step.rows,
            plan.num_computed_tokens,
            plan.num_scheduled_tokens,
            plan.samples,
            strict=True,
        )
        for request, start, count, samples in rows:
            token = next(sampled, -1) if samples else None
            if request is None or request.status.is_finished:  # ended after planning
                continue
            if request.num_kills and len(step.rows) == 1:
                self.state.clear(request)
            if request.request_id in errors:
                updates.append(self._fail(request, errors[request.request_id]))
            elif missing and self._lacks(request, start, start + count, missing):
                updates += self._missed(request)
            else:
                if request.status is RUNNING:  # else preempted since: only its token counts
                    self._advance(request, start, start + count)
                if not request.is_plain and request.awaits_prompt_logprobs:
                    found = result.prompt_logprobs.get(request.request_id, {})
                    _take_prompt_logprobs(request, start + count, found)
                if token is not None:
                    logprobs = result.logprobs.get(request.request_id)
                    updates.append(self._append(request, token, logprobs))
        updates += self._watch(plan)
        return updates

    def reset_after_worker_restart(self) -> list[RequestUpdate]:
        """Requeue all running requests for recomputation after the workers were restarted.

        Requests of the steps in flight become crash suspects and run alone. A suspect whose step
        crashes the workers again ends with INTERNAL; its update is returned.
        """
        suspects = self.state.reset_after_worker_restart()
        if len(suspects) != 1 or suspects[0].num_kills < 2:
            return []
        text = "the request's step crashed the workers twice"
        return [self._fail(suspects[0], RequestError("INTERNAL", text))]

    def _lacks(self, request: Request, start: int, end: int, missing: set[UnitKey]) -> bool:
        """Return whether an embedding for tokens [start, end) is missing."""
        return any(unit.key in missing for unit in overlapping(request.units, start, end))

    def _missed(self, request: Request) -> Updates:
        """Schedule the encoding of all units of a request that lacked an embedding.

        A worker that lost one unit may have lost the others, and reports one per step.
        """
        for unit in request.units:
            self.state.lose_embedding(unit.key)
        self.state.rewind(request)
        request.num_misses += 1
        if request.num_misses < MAX_MISSES:
            return ()
        text = f"an image embedding was missing in {request.num_misses} consecutive steps"
        return (self._fail(request, RequestError("INTERNAL", text)),)

    def _advance(self, request: Request, start: int, end: int) -> None:
        """Mark tokens [start, end) as computed.

        Releases the units that they finish and registers the blocks that they fill.
        """
        request.num_computed_tokens = end
        if start < request.media_end:
            self._release_units(request, start, end)
        size = self.config.block_size
        for index in range(start // size, end // size):
            self.blocks.seal(request.block_table[index], block_hash(request, index, size))

    def _release_units(self, request: Request, start: int, end: int) -> None:
        request.num_misses = 0
        units = list(overlapping(request.units, start, end))
        sent = overlapping(request.units, start, max(end, request.num_sent_tokens))
        needed = {unit.key for unit in sent if unit.end > end}  # the prompt repeats an image
        for unit in units:
            if unit.key not in needed:
                self.encoder_cache.release(unit.key, request.request_id)

    def _append(
        self, request: Request, token: int, logprobs: TokenLogprobs | None
    ) -> RequestUpdate:
        if token < 0:
            error = RequestError("INTERNAL", "the step returned no token")
            return self._fail(request, error)
        self.state.append(request, token)
        tokens = request.token_ids
        if token in request.stop_token_ids:
            status = RequestStatus.FINISHED_STOPPED
        elif len(tokens) - len(request.prompt_token_ids) >= request.max_tokens:
            status = RequestStatus.FINISHED_LENGTH
        else:
            status = RUNNING
        if status is not RUNNING:
            self._end(request, status)
        entries = () if logprobs is None else (logprobs,)
        return RequestUpdate(request.request_id, (token,), status, None, entries)

    def _watch(self, plan: StepPlan) -> Updates:
        """Fail the first request if nothing could run for `max_empty_steps` steps (watchdog)."""
        if plan.request_ids or plan.encode or self._may_be_empty():
            self._num_empty_steps = 0
            return ()
        self._num_empty_steps += 1
        if self._num_empty_steps < self.config.max_empty_steps:
            return ()
        self._num_empty_steps = 0
        head = (self.running or self.waiting)[0]
        steps = self.config.max_empty_steps
        text = f"nothing could run in {steps} steps; {self._state_of(head)}"
        return (self._fail(head, RequestError("RESOURCE_EXHAUSTED", text)),)

    def _may_be_empty(self) -> bool:
        """Return whether an empty step is expected: no requests, or pixels in the making."""
        requests = self.requests.values()
        return not requests or any(each.awaits_media for each in requests)

    def _state_of(self, request: Request) -> str:
        """Return the watchdog's description of a request and of the free resources."""
        blocks, encoder = self.blocks, self.encoder_cache
        needed = blocks.num_needed(request.num_tokens) - len(request.block_table)
        return (
            f"the request is {request.status.value}, {request.num_computed_tokens} of "
            f"{request.num_tokens} tokens computed; {needed} blocks needed, {blocks.num_free} of "
            f"{blocks.num_blocks} free; {encoder.room()} of {encoder.capacity} image tokens "
            f"available; {len(self.running)} running, {len(self.waiting)} waiting"
        )

    def _fail(self, request: Request, error: RequestError) -> RequestUpdate:
        """End a request with an error and drop its cached blocks and embeddings.

        Their content may be invalid, so that other requests must not reuse it.
        """
        self.blocks.forget(request.block_table)
        if request.status is RequestStatus.PREEMPTED:  # after its step was sent
            found = [self.blocks.find(each) for each in request.block_hashes]
            self.blocks.forget(block for block in found if block is not None)
        update = self._end(request, RequestStatus.FINISHED_ERROR, error)
        for unit in request.units:
            self.encoder_cache.forget(unit.key)
        return update

    def finish(
        self, request_id: str, status: RequestStatus, error: RequestError | None = None
    ) -> RequestUpdate | None:
        """End a request and free its resources. Returns None if it is unknown."""
        request = self.requests.get(request_id)
        return None if request is None else self._end(request, status, error)

    def _end(
        self, request: Request, status: RequestStatus, error: RequestError | None = None
    ) -> RequestUpdate:
        self.state.end(request, status, error)
        return RequestUpdate(request.request_id, (), status, error)

    def check_integrity(self) -> None:
        """Assert that counters and queues are consistent and that nothing leaked."""
        self.state.check_integrity()


def _take_prompt_logprobs(request: Request, end: int, found: Mapping[int, TokenLogprobs]) -> None:
    """Append prompt logprobs up to token `end`, whose logits are computed by now."""
    first, last = len(request.prompt_logprobs), min(end + 1, request.num_prompt_tokens)
    request.prompt_logprobs.extend(found.get(index) for index in range(first, last))
