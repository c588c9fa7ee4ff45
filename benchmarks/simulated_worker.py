"""A worker of whom only the bookkeeping is real: it checks that each plan could be computed.

It holds what the plans made it write: which tokens are in which slot, which units are embedded. The
token it samples is a function of everything that the row has seen, so that any wrong block, order
or position changes the output.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.scheduler.request import (
    EncodeUnit,
    MediaSpan,
    Request,
    RequestStatus,
    SamplingParams,
    UnitKey,
)
from octavo.scheduler.scheduler import Scheduler, SchedulerConfig, overlapping
from octavo.scheduler.step import RequestUpdate, StepPlan, StepResult

PARAMS = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0
)


def make_config(**changes: int) -> SchedulerConfig:
    settings = {
        "num_blocks": 16,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "max_encode_tokens": 16,
        "encoder_cache_tokens": 24,
        **changes,
    }
    return SchedulerConfig(**settings)


def make_request(
    request_id: str, num_tokens: int, *spans: tuple[int, int, bytes], max_tokens: int = 4
) -> Request:
    """A request with images of `n` tokens at `offset`: (offset, n, media_hash)."""
    units: tuple[EncodeUnit, ...] = ()
    for offset, count, media_hash in spans:
        units += MediaSpan(offset, count, (1, 2, 2 * count), media_hash).units(4)
    tokens = array("i", [hash((request_id, i)) % 50 for i in range(num_tokens)])
    params = SamplingParams(**{**vars(PARAMS), "max_tokens": max_tokens})
    return Request(request_id, tokens, params, units)


def naive_output(request: Request, count: int) -> list[int]:
    """What the request's first `count` tokens must be, whatever else ran."""
    tokens = list(request.prompt_token_ids)
    for _ in range(count):
        tokens.append(next_token(tokens, request))
    return tokens[request.num_prompt_tokens :]


def next_token(tokens: list[int], request: Request) -> int:
    seen = repr((tokens, [(u.key, u.offset) for u in request.units])).encode()
    return int.from_bytes(hashlib.sha256(seen).digest()[:2], "little") % 50


@dataclass
class SimulatedWorker:
    block_size: int
    slots: dict[int, tuple[str, int, int]] = field(default_factory=dict)  # who, place, token
    embeddings: set[UnitKey] = field(default_factory=set)
    encoded: int = 0  # tokens encoded in all

    def step(
        self, plan: StepPlan, requests: dict[str, Request], config: SchedulerConfig
    ) -> StepResult:
        assert plan.num_tokens <= config.max_num_batched_tokens
        assert len(plan.request_ids) <= config.max_num_seqs
        assert len(set(plan.request_ids)) == len(plan.request_ids)
        self._encode(plan, config)
        sampled, missing = [], []
        for row in range(len(plan.request_ids)):
            token, lacking = self._row(plan, row, requests[plan.request_ids[row]])
            missing += lacking
            if plan.samples[row]:
                sampled.append(token)
        return StepResult(plan.step_id, tuple(sampled), tuple(missing))

    def _encode(self, plan: StepPlan, config: SchedulerConfig) -> None:
        for key in plan.drop:
            self.embeddings.discard(key)
        cost = sum(p.unit.num_tokens for p in plan.encode)
        assert cost <= config.max_encode_tokens
        self.encoded += cost
        self.embeddings |= {p.unit.key for p in plan.encode}

    def _row(self, plan: StepPlan, row: int, request: Request) -> tuple[int, list[UnitKey]]:
        start, count = plan.num_computed_tokens[row], plan.num_scheduled_tokens[row]
        table = plan.block_tables[row]
        assert count > 0 and start + count <= len(table) * self.block_size
        units = overlapping(request.units, start, start + count)
        lacking = [unit.key for unit in units if unit.key not in self.embeddings]
        if lacking:
            return -1, lacking

        def slot(place: int) -> int:
            return table[place // self.block_size] * self.block_size + place % self.block_size

        for place in range(start, start + count):
            self.slots[slot(place)] = (request.request_id, place, request.token_ids[place])
        tokens = []
        for place in range(start + count):  # everything before is still where it was written
            who, at, token = self.slots[slot(place)]
            assert (who, at) == (request.request_id, place), "another's token in this row's block"
            tokens.append(token)
        return next_token(tokens, request), []


@dataclass
class Simulation:
    """A scheduler over the simulated worker; outputs by request."""

    config: SchedulerConfig
    spoil: Callable[[StepPlan, StepResult], StepResult] = lambda plan, result: result

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self.worker = SimulatedWorker(self.config.block_size)
        self.outputs: dict[str, list[int]] = {}
        self.ended: dict[str, RequestUpdate] = {}
        self.preemptions = 0

    def step(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        self.preemptions += len(plan.preempted)
        result = self.worker.step(plan, self.scheduler.requests, self.config)
        for update in self.scheduler.update(plan, self.spoil(plan, result)):
            self.outputs.setdefault(update.request_id, []).extend(update.new_token_ids)
            if update.status.is_finished:
                assert update.request_id not in self.ended
                self.ended[update.request_id] = update
        self.scheduler.check_integrity()
        return plan

    def run(self, most: int = 5000) -> None:
        """Steps until nothing is left."""
        for _ in range(most):
            if self.step() is None:
                break
        assert not self.scheduler.requests, "the scheduler is not empty"
        assert self.scheduler.blocks.num_free == self.config.num_blocks

    def finish(self, request_id: str) -> None:
        update = self.scheduler.finish(request_id, RequestStatus.FINISHED_ABORTED)
        if update is not None:
            self.ended[request_id] = update
