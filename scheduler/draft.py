"""A step plan in the making: what is in it, and what is left to give away."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .request import Request, UnitKey
from .step import EncodePlan, StepPlan


@dataclass(slots=True, eq=False)
class StepDraft:
    """What is left to give away, and the rows so far: parallel lists as in `StepPlan`."""

    token_budget: int  # tokens that are left
    encoder_budget: int  # image tokens that are left
    num_decoding: int  # running requests that need one token and have no row yet; it is kept for
    # them
    num_prefilling: int  # running requests that need more than one token
    num_ending: int  # running requests whose last token, or one that they go by, is on its way
    others_decode: bool  # some request decodes, so a long prompt goes in small pieces
    num_waiting: int  # for them a long prompt leaves room: they may be short
    num_pieces: int = 0  # rows so far that do not finish what is known
    num_passed_over: int = 0  # waiting requests that could not start and did not stop the others
    may_start: bool = True  # nothing more urgent has failed to find room
    may_encode: bool = True  # nothing more urgent has failed to be encoded
    last_victim: tuple[float, int] = (math.inf, 0)  # nothing less urgent may start in its place
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
        """For other rows than those that decode."""
        return self.token_budget - self.num_decoding

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.preempted)

    def add_row(self, request: Request, count: int, left: int) -> None:
        """Sends `count` of the `left` tokens that a request has still to compute."""
        start = request.num_sent_tokens
        samples = count == left and start + count < request.num_ready_tokens
        self.token_budget -= count
        self.num_pieces += not samples
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
        """A waiting request did not start; `most` of them in a step, then no one else does."""
        self.may_encode = self.may_encode and not wants_encoding
        self.num_passed_over += 1
        self.may_start = self.num_passed_over < most

    def add_copy(self, old: int, new: int) -> None:
        """Block `new` gets the content of `old`; if that is to be a copy itself, of what it is a
        copy of: all are read before any is written."""
        source = next((source for source, copy in self.copies if copy == old), old)
        self.copies.append((source, new))

    def as_plan(self, step_id: int, drop: tuple[UnitKey, ...]) -> StepPlan:
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
