"""A simulated worker that computes nothing, but checks that each plan is executable.

It tracks the contents of each KV slot and the encoded units. A slot holds a digest of everything
that its keys and values depend on: the salt, all tokens up to its position and the media among
them. A row may only read slots whose digests match its own, so a wrong block, order, position,
image or tenant fails in the step that reads it. A row's sampled token is a function of its digest.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from octavo.scheduler.admission import SchedulerConfig
from octavo.scheduler.params import SamplingParams
from octavo.scheduler.request import (
    EncodeUnit,
    MediaSpan,
    Request,
    RequestStatus,
    UnitKey,
    overlapping,
    salted,
)
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.step import RequestUpdate, StepPlan, StepResult
from octavo.scheduler.structured import ANY_OBJECT

VOCABULARY = 50
PARAMS = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0
)
Span = tuple[int, int, bytes] | tuple[int, int, bytes, int]  # offset, tokens, media_hash; frames


def make_config(**changes: int | float) -> SchedulerConfig:
    settings: dict[str, int | float] = {
        "num_blocks": 16,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "max_encode_tokens": 16,
        "encoder_cache_tokens": 24,
        **changes,
    }
    return SchedulerConfig(**settings)  # type: ignore[arg-type]


def make_request(
    request_id: str,
    prompt: int | Sequence[int],
    *spans: Span,
    max_tokens: int = 4,
    seed: int = 0,
    cache_salt: bytes = b"",
    is_guided: bool = False,
    **more: object,
) -> Request:
    """Return a request whose prompt contains images or videos.

    A span is (offset, number of tokens, media_hash) for an image, or has the number of frames as a
    fourth item for a video, with one unit per frame. `prompt` has the tokens, or their number.
    """
    if isinstance(prompt, int):
        names = (f"{request_id} {i}".encode() for i in range(prompt))
        prompt = [zlib.crc32(name) % VOCABULARY for name in names]
    units: list[EncodeUnit] = []
    for offset, count, media_hash, *frames in spans:
        grid = (int(frames[0]) if frames else 1, 2, 2 * count)
        name = salted(media_hash, cache_salt)
        units += [replace(u, media_hash=name) for u in MediaSpan(offset, count, grid).units(1)]
    given = {**vars(PARAMS), "max_tokens": max_tokens, "seed": seed}
    params = SamplingParams(**{**given, "structured": ANY_OBJECT if is_guided else None})
    tokens = array("i", prompt)
    return Request(request_id, tokens, params, tuple(units), cache_salt, **more)  # type: ignore[arg-type]


def extend_digests(digests: list[int], request: Request, tokens: Sequence[int]) -> list[int]:
    """Append the digests of `tokens` to `digests`, which has those of all tokens before them.

    A digest stands for a token and everything before it; it is the same in every process.
    """
    start = len(digests)
    last = digests[-1] if digests else zlib.crc32(request.cache_salt)
    under: dict[int, tuple[int, int, int]] = {}
    for unit in overlapping(request.units, start, start + len(tokens)):
        name = zlib.crc32(unit.media_hash)
        under |= {at: (name, unit.index, at - unit.offset) for at in range(unit.offset, unit.end)}
    for at, token in enumerate(tokens, start):
        last = hash((last, token, *under.get(at, ())))
        digests.append(last)
    return digests


def naive_output(request: Request, count: int) -> list[int]:
    """Return the first `count` tokens that the request has when run alone."""
    alone = Request(
        "alone", request.prompt_token_ids, request.params, request.units, request.cache_salt
    )
    digests: list[int] = []
    for _ in range(count):
        extend_digests(digests, alone, alone.token_ids[len(digests) :])
        alone.token_ids.append(next_token(digests[-1], request))
    return list(alone.output_token_ids)


def next_token(digest: int, request: Request) -> int:
    return hash((digest, request.params.seed)) % VOCABULARY


@dataclass
class SimulatedWorker:
    config: SchedulerConfig
    slots: dict[int, int] = field(default_factory=dict)  # slot: digest
    embeddings: dict[UnitKey, int] = field(default_factory=dict)  # number of tokens by unit
    encoded: int = 0  # total encoded tokens
    computed: int = 0  # total computed tokens
    plans: list[StepPlan] = field(default_factory=list)  # executed plans
    _digests: dict[str, list[int]] = field(default_factory=dict)  # by request id
    # Tokens sampled by the latest step; rows of the next step may await them.
    _sampled: tuple[int, ...] = ()
    # First token of each row of the latest step that computed nothing, by request id.
    _lacking: dict[str, int] = field(default_factory=dict)

    def step(self, plan: StepPlan, requests: dict[str, Request]) -> StepResult:
        config = self.config
        assert plan.num_tokens <= config.max_num_batched_tokens
        assert len(plan.request_ids) <= config.max_num_seqs
        assert len(set(plan.request_ids)) == len(plan.request_ids)
        self.plans.append(plan)
        self._copy(plan)
        self._encode(plan, requests)
        self.computed += plan.num_tokens
        sampled, missing = [], []
        before, self._lacking = self._lacking, {}
        for row, request_id in enumerate(plan.request_ids):
            if plan.num_computed_tokens[row] > before.get(request_id, math.inf):
                token = self._spoilt_row(plan, row)
            else:
                token, lacking = self._row(plan, row, requests[request_id])
                missing += lacking
            if plan.samples[row]:
                sampled.append(token)
        self._sampled = tuple(sampled)
        return StepResult(plan.step_id, self._sampled, tuple(missing))

    def _copy(self, plan: StepPlan) -> None:
        size = self.config.block_size
        assert len({new for _, new in plan.copies}) == len(plan.copies), "two copies into a block"
        read = [[self.slots.get(old * size + i) for i in range(size)] for old, _ in plan.copies]
        for (_, new), digests in zip(plan.copies, read, strict=True):
            for i, digest in enumerate(digests):
                self.slots.pop(new * size + i, None)
                if digest is not None:
                    self.slots[new * size + i] = digest

    def _encode(self, plan: StepPlan, requests: dict[str, Request]) -> None:
        for key in plan.drop:
            self.embeddings.pop(key, None)
        cost = sum(p.unit.num_tokens for p in plan.encode)
        assert cost <= self.config.max_encode_tokens
        self.encoded += cost
        for each in plan.encode:
            assert each.unit in requests[each.request_id].units, "pixels of another request"
            assert each.unit.key not in self.embeddings, "encoded twice"
            self.embeddings[each.unit.key] = each.unit.num_tokens
        assert sum(self.embeddings.values()) <= self.config.encoder_cache_tokens

    def _spoilt_row(self, plan: StepPlan, row: int) -> int:
        """Clear the slots of a row that follows a row that computed nothing.

        It was planned before that was known, so its results are discarded.
        """
        start, size = plan.num_computed_tokens[row], self.config.block_size
        for at in range(start, start + plan.num_scheduled_tokens[row]):
            self.slots.pop(plan.block_tables[row][at // size] * size + at % size, None)
        return -1

    def _row(self, plan: StepPlan, row: int, request: Request) -> tuple[int, list[UnitKey]]:
        start, count = plan.num_computed_tokens[row], plan.num_scheduled_tokens[row]
        table, size = plan.block_tables[row], self.config.block_size
        assert count > 0 and start + count <= len(table) * size
        units = overlapping(request.units, start, start + count)
        lacking = [unit.key for unit in units if unit.key not in self.embeddings]
        if lacking:
            self._lacking[request.request_id] = start
            return -1, lacking
        if plan.awaits[row] < 0:
            tokens = list(request.token_ids[start : start + count])
        elif (token := self._sampled[plan.awaits[row]]) >= 0:
            tokens = [token]
        else:  # the awaited row computed nothing, so this one cannot either
            return -1, []
        assert len(tokens) == count, f"{request.request_id}: unknown tokens"
        assert plan.samples[row] == (start + count >= request.num_tokens)
        digests = self._digests.setdefault(request.request_id, [])
        del digests[start:]  # left from a run before preemption
        extend_digests(digests, request, [*request.token_ids[len(digests) : start], *tokens])
        slots = [table[at // size] * size + at % size for at in range(start + count)]
        for at in range(start):
            assert self.slots.get(slots[at]) == digests[at], (
                f"{request.request_id} reads foreign contents at position {at}"
            )
        for at in range(start, start + count):
            self.slots[slots[at]] = digests[at]
        return next_token(digests[start + count - 1], request), []


@dataclass
class Simulation:
    """A scheduler with a simulated worker and clock; collects the outputs of each request."""

    config: SchedulerConfig
    spoil: Callable[[StepPlan, StepResult], StepResult] = lambda plan, result: result
    overlap: bool = False  # plan a step while the previous one is in flight
    step_seconds: Callable[[StepPlan], float] = lambda plan: 0.01

    def __post_init__(self) -> None:
        self.now = self.planned_at = 0.0  # planned_at: time of the latest plan
        self.scheduler = Scheduler(self.config, clock=lambda: self.now)
        self.worker = SimulatedWorker(self.config)
        self.outputs: dict[str, list[int]] = {}
        self.ended: dict[str, RequestUpdate] = {}
        self.preemptions = 0
        self.in_flight: list[tuple[StepPlan, StepResult]] = []

    def step(self) -> StepPlan | None:
        """Plan a step and process the result of the previous one (without `overlap`, its own).

        Returns None if there was nothing to plan.
        """
        self.planned_at = self.now
        self._take(self.scheduler.expire())
        plan = self.scheduler.schedule()
        if plan is not None:
            self.preemptions += len(plan.preempted)
            self.in_flight.append((plan, self.worker.step(plan, self.scheduler.requests)))
        if self.in_flight and (plan is None or not self.overlap or len(self.in_flight) > 1):
            self.receive()
        self.scheduler.check_integrity()
        return plan

    def receive(self) -> None:
        """Complete the oldest step in flight."""
        plan, result = self.in_flight.pop(0)
        self.now += self.step_seconds(plan)
        self._take(self.scheduler.update(self.spoil(plan, result)))

    def reset_after_worker_restart(self) -> None:
        """Replace the worker, dropping its contents and the steps in flight."""
        self.in_flight.clear()
        self.worker = SimulatedWorker(self.config)
        self._take(self.scheduler.reset_after_worker_restart())

    def _take(self, updates: Sequence[RequestUpdate]) -> None:
        for update in updates:
            assert update.request_id not in self.ended, "update for a finished request"
            self.outputs.setdefault(update.request_id, []).extend(update.new_token_ids)
            if update.status.is_finished:
                self.ended[update.request_id] = update

    def run(self, most: int = 5000) -> None:
        """Run steps until no request is left."""
        for _ in range(most):
            if self.step() is None and not self.scheduler.requests:
                break
        while self.in_flight:
            self.receive()
        assert not self.scheduler.requests, "the scheduler is not empty"
        assert not self.scheduler.running and not self.scheduler.waiting
        assert self.scheduler.blocks.num_free == self.config.num_blocks
        assert self.scheduler.encoder_cache.room() == self.config.encoder_cache_tokens

    def finish(self, request_id: str) -> None:
        update = self.scheduler.finish(request_id, RequestStatus.FINISHED_ABORTED)
        if update is not None:
            self._take([update])
