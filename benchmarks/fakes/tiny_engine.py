"""A scheduler and a ModelRunner in one process: an engine without workers.

For tests that inspect every step of the real model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...engine.core.batch_builder import build_batch, step_result
from ...engine.core.penalty_slots import SamplingSlots
from ...engine.media.item import UnitContent
from ...engine.runner.model_runner import ModelRunner
from ...engine.structured_output.compiler import Grammar
from ...engine.structured_output.matchers import Matchers
from ...scheduler.admission import SchedulerConfig
from ...scheduler.logprobs import TokenLogprobs
from ...scheduler.request import Request, UnitKey
from ...scheduler.scheduler import Scheduler
from ...scheduler.step import StepPlan, StepResult
from .tiny_requests import TinyRequest


@dataclass(eq=False)
class TinyEngine:
    """Call `add`, then `step` or `run`. The runner's cache must have `config.num_blocks` blocks."""

    runner: ModelRunner
    config: SchedulerConfig
    overlap: bool = True  # run a step before the previous step's result is processed
    requests: dict[str, Request] = field(default_factory=dict)
    pixels: dict[str, dict[UnitKey, UnitContent]] = field(default_factory=dict)
    num_encoded: int = 0
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)  # of the sampled tokens

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self._slots, self._matchers = SamplingSlots(), Matchers()
        self._on_way: list[StepResult] = []
        self.runner.embeddings.clear()

    def add(
        self,
        name: str,
        tiny: TinyRequest,
        max_tokens: int,
        num_forks: int = 0,
        priority: int = 5,
        grammar: Grammar | None = None,
        **more: Any,
    ) -> None:
        """Add a request and forks of it, whose seeds follow its own.

        `more` has fields of `Request`.
        """
        names = [name, *(f"{name}[{i}]" for i in range(1, num_forks + 1))]
        added = [
            _request(each, tiny, max_tokens, i, priority, more) for i, each in enumerate(names)
        ]
        self.scheduler.add(*added)
        if grammar is not None:
            self._matchers.add(added, grammar)
        self.requests |= {request.request_id: request for request in added}
        self.pixels |= dict.fromkeys(names, _pixels(tiny, self.runner))

    def step(self) -> StepPlan | None:
        """Run a step; return its plan, or None if there was nothing to plan."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.num_encoded += len(plan.encode)
            requests = self.scheduler.requests
            batch = build_batch(plan, requests, self.pixels, self._slots, 1, self._matchers)
            result = self.runner.step(batch)
            self._on_way.append(step_result(plan, result, self.scheduler.requests))
        if plan is None or len(self._on_way) > self.overlap:
            self.receive()
        self.scheduler.check_integrity()
        return plan

    def receive(self) -> None:
        """Process the result of the oldest step in flight, if any."""
        if self._on_way:
            updates = self.scheduler.update(self._on_way.pop(0))
            for update in self._matchers.read(updates, self.scheduler):
                self.logprobs.setdefault(update.request_id, []).extend(update.logprobs)

    def run(self) -> None:
        while self.scheduler.requests or self._on_way:
            self.step()

    def output(self, name: str) -> list[int]:
        return list(self.requests[name].output_token_ids)


def _request(
    name: str, tiny: TinyRequest, max_tokens: int, fork: int, priority: int, more: Any
) -> Request:
    seed = (tiny.params.seed or 0) + fork
    params = replace(tiny.params, max_tokens=max_tokens, seed=seed)
    if fork:
        params = replace(params, prompt_logprobs=None)
    return Request(
        name,
        array("i", tiny.token_ids),
        params,
        tiny.units,
        priority=priority,
        mrope_positions=tuple(array("i", axis.tolist()) for axis in tiny.positions),
        mrope_position_delta=tiny.delta,
        **more,
    )


def _pixels(tiny: TinyRequest, runner: ModelRunner) -> dict[UnitKey, UnitContent]:
    both = runner.config.vision.temporal_patch_size
    found: dict[UnitKey, UnitContent] = {}
    done: dict[bytes, int] = dict.fromkeys(tiny.media, 0)
    for unit in _once(tiny):
        name = unit.media_hash
        media, (_, height, width) = tiny.media[name], tiny.grids[name]
        grid = (unit.num_patches // (height * width), height, width)
        start = done[name] * both
        done[name] += grid[0]
        pixels = media.pixels[start : start + grid[0] * both] if media.is_video else media.pixels
        found[unit.key] = UnitContent(name, grid, pixels)
    return found


def _once(tiny: TinyRequest) -> Sequence:
    """Return the request's units; an item used twice is counted once."""
    return list({unit.key: unit for unit in tiny.units}.values())
