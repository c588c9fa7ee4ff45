"""Decides what runs in each step.

One rule: every request's `num_computed_tokens` catches up with its `num_tokens`, the most urgent
first, as far as the step's token budget, the blocks and the encode budget allow. Prefill, chunked
prefill, prefix hits, forks, decoding and resuming after preemption are that same line.

One order: a request's urgency is its time of arrival, later by `priority_ageing_s` for each
priority. It never changes, so a request that waits comes before all that arrive late enough,
whatever their priority. Requests are planned in that order and preempted from its other end.

`state.py` has the queues, `planner.py` makes a step of them; here requests come in, steps come
back, and requests end.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

from .admission import AdmissionError, SchedulerConfig, check_queue, check_size
from .block_hash import block_hash
from .logprobs import TokenLogprobs
from .planner import Planner
from .request import Request, RequestStatus, UnitKey, overlapping
from .state import InFlight, SchedulerState
from .step import RequestUpdate, StepPlan, StepResult

MAX_MISSES = 3  # steps in a row that lack a request's embedding: then the request fails
RUNNING = RequestStatus.RUNNING

Updates = Sequence[RequestUpdate]


class Scheduler:
    """Owns every request from `add` until it is finished. Not thread-safe."""

    def __init__(
        self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock`: seconds; what deadlines and ageing go by."""
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
        """Admits a request, and others with the same prompt that are to share its blocks. One
        place in the queue does for all.

        Raises `AdmissionError` for what could never run, `QueueFull` for what may be tried again.
        """
        for each in (request, *forks):
            if each.request_id in self.requests:
                raise AdmissionError(f"request_id={each.request_id!r}: in use")
        check_size(request, self.config)
        queued = (self.state.num_queued, self.state.num_queued_tokens)
        check_queue(request, *queued, len(self.running), self.config)
        asked = request.params.max_tokens
        room = self.config.max_request_len - request.num_prompt_tokens
        due = self.clock() + request.priority * self.config.priority_ageing_s
        for each in (request, *forks):
            each.parent = None if each is request else request
            each.max_tokens = min(asked if asked is not None else room, room)
            each.urgency = (due, next(self._arrivals))
            self.state.add(each)

    def expire(self) -> list[RequestUpdate]:
        """Ends every request whose deadline has passed. To be called before each `schedule`."""
        ended: list[RequestUpdate] = []
        for request in self.state.take_expired(self.clock()):
            done = request.num_output_tokens
            text = f"DEADLINE_EXCEEDED: the time ran out after {done} tokens of output"
            ended.append(self._end(request, RequestStatus.FINISHED_ERROR, text))
        return ended

    def schedule(self) -> StepPlan | None:
        """The next step; None when there is no request, or all of them await the step on its way.

        One step may be planned while another is on its way. `update` must follow for each, in
        order.
        """
        in_flight = self.state.in_flight
        assert len(in_flight) <= 1, "two steps are on their way"
        if not self.requests or (in_flight and self.state.suspects):  # those run alone
            return None
        draft = self._planner.plan()
        if in_flight and draft.is_empty:
            return None
        plan = draft.as_plan(next(self._step_ids), self.encoder_cache.take_evicted())
        in_flight.append(InFlight(plan, [*draft.rows]))
        return plan

    def update(self, result: StepResult) -> list[RequestUpdate]:
        """Takes in what the oldest step on its way computed; one update for each request that it
        changed visibly."""
        step = self.state.in_flight.popleft()
        plan = step.plan
        assert result.step_id == plan.step_id, "the result of another step"
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
            if request is None or request.status.is_finished:  # since the plan was made
                continue
            if request.num_kills and len(step.rows) == 1:
                self.state.clear(request)
            if request.request_id in errors:
                updates.append(self._fail(request, errors[request.request_id]))
            elif missing and self._lacks(request, start, start + count, missing):
                updates += self._missed(request)
            else:
                if request.status is RUNNING:  # else it was preempted since, and keeps its token
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
        """The workers ended, perhaps in a step that was on its way, and new ones have nothing.

        All that ran starts over with the tokens it has. A request is blamed by running it alone:
        if its step ends the workers again, it ends with INTERNAL, and the others go on.
        """
        blamed = self.state.reset_after_worker_restart()
        if len(blamed) != 1 or blamed[0].num_kills < 2:
            return []
        return [self._fail(blamed[0], "INTERNAL: the request's step ended the workers twice")]

    def _lacks(self, request: Request, start: int, end: int, missing: set[UnitKey]) -> bool:
        """An embedding was missing, so the row computed nothing."""
        return any(unit.key in missing for unit in overlapping(request.units, start, end))

    def _missed(self, request: Request) -> Updates:
        """The next plan encodes what was missing; and all its units, since a worker that lost one
        may have lost the others, and would tell of them one by one."""
        for unit in request.units:
            self.state.lose_embedding(unit.key)
        self.state.rewind(request)
        request.num_misses += 1
        if request.num_misses < MAX_MISSES:
            return ()
        text = f"an image's embedding was missing in {request.num_misses} steps in a row"
        return (self._fail(request, text),)

    def _advance(self, request: Request, start: int, end: int) -> None:
        """Tokens [start, end) are computed: units that they end are needed no more, and blocks
        that they fill can be found by others."""
        request.num_computed_tokens = end
        if start < request.media_end:
            self._let_go(request, start, end)
        size = self.config.block_size
        for index in range(start // size, end // size):
            self.blocks.seal(request.block_table[index], block_hash(request, index, size))

    def _let_go(self, request: Request, start: int, end: int) -> None:
        request.num_misses = 0
        units = list(overlapping(request.units, start, end))
        sent = overlapping(request.units, start, max(end, request.num_sent_tokens))
        needed = {unit.key for unit in sent if unit.end > end}  # an image that comes twice
        for unit in units:
            if unit.key not in needed:
                self.encoder_cache.release(unit.key, request.request_id)

    def _append(
        self, request: Request, token: int, logprobs: TokenLogprobs | None
    ) -> RequestUpdate:
        if token < 0:
            return self._fail(request, "the step gave no token")
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
        told = () if logprobs is None else (logprobs,)
        return RequestUpdate(request.request_id, (token,), status, "", told)

    def _watch(self, plan: StepPlan) -> Updates:
        """Fails the head when nothing has run for many steps; that should never happen, and if it
        does it must not be silent."""
        if plan.request_ids or plan.encode or self._may_be_empty():
            self._num_empty_steps = 0
            return ()
        self._num_empty_steps += 1
        if self._num_empty_steps < self.config.max_empty_steps:
            return ()
        self._num_empty_steps = 0
        head = (self.running or self.waiting)[0]
        steps = self.config.max_empty_steps
        text = f"RESOURCE_EXHAUSTED: nothing could run in {steps} steps; {self._state_of(head)}"
        return (self._fail(head, text),)

    def _may_be_empty(self) -> bool:
        """Whether there is nothing to run, or pixels are still being made, in their own time."""
        requests = self.requests.values()
        return not requests or any(each.awaits_media for each in requests)

    def _state_of(self, request: Request) -> str:
        """What the watchdog tells of a request and of what it may lack."""
        blocks, encoder = self.blocks, self.encoder_cache
        needed = blocks.num_needed(request.num_tokens) - len(request.block_table)
        return (
            f"the request is {request.status.value}, {request.num_computed_tokens} of "
            f"{request.num_tokens} tokens computed; {needed} blocks needed, {blocks.num_free} of "
            f"{blocks.num_blocks} free; room for {encoder.room()} of {encoder.capacity} image "
            f"tokens; {len(self.running)} running, {len(self.waiting)} waiting"
        )

    def _fail(self, request: Request, error: str) -> RequestUpdate:
        """Ends a request by its own fault. What it has computed may be in doubt as well, so nobody
        is to find its blocks and embeddings."""
        self.blocks.forget(request.block_table)
        if request.status is RequestStatus.PREEMPTED:  # since its step was sent
            found = [self.blocks.find(each) for each in request.block_hashes]
            self.blocks.forget(block for block in found if block is not None)
        update = self._end(request, RequestStatus.FINISHED_ERROR, error)
        for unit in request.units:
            self.encoder_cache.forget(unit.key)
        return update

    def finish(
        self, request_id: str, status: RequestStatus, error: str = ""
    ) -> RequestUpdate | None:
        """Ends a request and frees what it holds; None when it is not here."""
        request = self.requests.get(request_id)
        return None if request is None else self._end(request, status, error)

    def _end(self, request: Request, status: RequestStatus, error: str = "") -> RequestUpdate:
        self.state.end(request, status, error)
        return RequestUpdate(request.request_id, (), status, error)

    def check_integrity(self) -> None:
        """Counts and queues are right, and nothing is held for nobody. Tests call it last."""
        self.state.check_integrity()


def _take_prompt_logprobs(request: Request, end: int, found: Mapping[int, TokenLogprobs]) -> None:
    """Tokens up to `end` are computed: they tell of those up to the one after them."""
    first, last = len(request.prompt_logprobs), min(end + 1, request.num_prompt_tokens)
    request.prompt_logprobs.extend(found.get(index) for index in range(first, last))
