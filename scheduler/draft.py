"""A step plan in the making: what is in it, and what is left to give away."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

from .request import Request, UnitKey
from .step import EncodePlan, StepPlan


@dataclass(slots=True, eq=False)
class StepDraft:
    """What is left to give away, and the rows so far: parallel lists as in `StepPlan`."""

    token_budget: int  # tokens that are left
    encoder_budget: int  # image tokens that are left
    num_decoding: int  # running requests that need one token and have no row yet: a token of the
    # budget is kept for each
    num_partial: (
        int  # running requests that will still lack tokens after this step, as far as known
    )
    protects_decoding: bool  # others decode, so a long prompt goes in small chunks
    may_start: bool = True  # nothing more urgent has failed to find room
    last_victim: tuple[float, int] = (math.inf, 0)  # nothing less urgent may start in its place
    request_ids: list[str] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    block_tables: list[array[int]] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    encode: list[EncodePlan] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)

    def add_row(self, request: Request, count: int, left: int) -> None:
        """`count` of the `left` tokens that a request has still to compute."""
        self.token_budget -= count
        self.request_ids.append(request.request_id)
        self.num_computed_tokens.append(request.num_computed_tokens)
        self.num_scheduled_tokens.append(count)
        self.block_tables.append(request.block_table)
        self.samples.append(count == left)

    def add_copy(self, old: int, new: int) -> None:
        """Block `new` gets the content of `old`; if that is to be a copy itself, of what it is a
        copy of: all are read before any is written."""
        source = next((source for source, copy in self.copies if copy == old), old)
        self.copies.append((source, new))

    def as_plan(self, step_id: int, drop: tuple[UnitKey, ...]) -> StepPlan:
        return StepPlan(
            step_id=step_id,
            request_ids=tuple(self.request_ids),
            num_computed_tokens=tuple(self.num_computed_tokens),
            num_scheduled_tokens=tuple(self.num_scheduled_tokens),
            block_tables=tuple(self.block_tables),
            samples=tuple(self.samples),
            copies=tuple(self.copies),
            encode=tuple(self.encode),
            drop=drop,
            preempted=tuple(self.preempted),
        )
