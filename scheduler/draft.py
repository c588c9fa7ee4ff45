"""A step plan under construction and its remaining budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .request import Request, UnitKey
from .step import EncodePlan, StepPlan


@dataclass(slots=True, eq=False)
class StepDraft:
    """Remaining budgets, and the rows so far as parallel lists like those of `StepPlan`."""

    token_budget: int  # remaining tokens
    encoder_budget: int  # remaining image tokens
    num_decoding: int  # running requests that need one token and have no row yet: reserved
    num_prefilling: int  # running requests that need more than one token
    num_ending: int  # running requests that only await a token in flight
    others_decode: bool  # some request decodes, so chunks of prompts are small
    num_waiting: int  # chunks leave budget for waiting requests, which may be short
    num_chunks: int = 0  # rows so far that do not finish the known tokens (chunks)
    num_passed_over: int = 0  # waiting requests that were skipped
    may_start: bool = True  # no higher-ranked request lacked resources
    may_encode: bool = True  # no higher-ranked request lacked encode budget
    last_victim: tuple[float, int] = (math.inf, 0)  # latest preempted; lower ranks may not start
    rows: list[Request] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    awaits: list[int] = field(default_factory=list)
    num_samples: int = 0
    copies: list[tuple[int, int]] = field(default_factory=list)
    encode: list[EncodePlan] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    num_decode_tokens: int = 0

    @property
    def tokens_left(self) -> int:
        """Return the token budget for rows other than running decodes."""
        return self.token_budget - self.num_decoding

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.preempted)

    def add_row(self, request: Request, count: int, left: int) -> None:
        """Add a row for `count` of the `left` tokens that a request has to compute."""
        start = request.num_sent_tokens
        samples = count == left and start + count < request.num_ready_tokens
        self.token_budget -= count
        self.num_chunks += not samples
        self.num_decode_tokens += count == 1 and start >= len(request.prompt_token_ids)
        self.rows.append(request)
        self.num_computed_tokens.append(start)
        self.num_scheduled_tokens.append(count)
        self.samples.append(samples)
        self.awaits.append(request.sample_index if start == len(request.token_ids) else -1)
        request.num_sent_tokens += count
        if samples:
            request.num_awaited_tokens += 1
            request.sample_index = self.num_samples
            self.num_samples += 1

    def pass_over(self, most: int, wants_encoding: bool) -> None:
        """Skip a waiting request that cannot start.

        After `most` skipped requests no other request starts in this step.
        """
        self.may_encode = self.may_encode and not wants_encoding
        self.num_passed_over += 1
        self.may_start = self.num_passed_over < most

    def add_copy(self, old: int, new: int) -> None:
        """Copy block `old` to block `new`.

        If `old` itself is the target of a copy, read from that copy's source instead, because all
        sources are read before any write.
        """
        source = next((source for source, copy in self.copies if copy == old), old)
        self.copies.append((source, new))

    def as_plan(self, step_id: int, drop: tuple[UnitKey, ...]) -> StepPlan:
        """Return the plan; `drop` lists embeddings to delete."""
        return StepPlan(
            step_id=step_id,
            request_ids=tuple([row.request_id for row in self.rows]),
            num_computed_tokens=tuple(self.num_computed_tokens),
            num_scheduled_tokens=tuple(self.num_scheduled_tokens),
            block_tables=tuple([row.block_table for row in self.rows]),
            samples=tuple(self.samples),
            awaits=tuple(self.awaits),
            copies=tuple(self.copies),
            encode=tuple(self.encode),
            drop=drop,
            preempted=tuple(self.preempted),
            started=tuple(self.started),
            num_decode_tokens=self.num_decode_tokens,
        )
