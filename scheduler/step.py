"""What crosses the border between scheduler and workers in one step. Plain data."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from .logprobs import TokenLogprobs
from .request import EncodeUnit, RequestStatus, UnitKey


@dataclass(frozen=True)
class EncodePlan:
    """One unit to encode in this step, and the request whose pixels serve for it."""

    unit: EncodeUnit
    request_id: str


@dataclass(frozen=True)
class StepPlan:
    """What runs in one step. The arrays are parallel: one entry a row, one row a request."""

    step_id: int
    request_ids: tuple[str, ...]
    num_computed_tokens: tuple[int, ...]  # before this step
    num_scheduled_tokens: tuple[int, ...]  # tokens to compute now
    block_tables: tuple[array[int], ...]  # the requests' own: to be read before the next plan
    samples: tuple[bool, ...]  # the row reaches its last token, so a new one is drawn
    # The row's one token is not known yet: its place among those that the step before, which is on
    # its way, draws; else -1. Empty: no row has one.
    awaits: tuple[int, ...] = ()
    # (from, to): blocks to copy; all are read before any is written, and before the step's tokens
    copies: tuple[tuple[int, int], ...] = ()
    encode: tuple[EncodePlan, ...] = ()  # units to encode, in order of need
    drop: tuple[UnitKey, ...] = ()  # embeddings that workers may forget, before encoding
    preempted: tuple[str, ...] = ()  # requests that lost their blocks while planning
    started: tuple[str, ...] = ()  # requests that were waiting and run from this step on
    num_decode_tokens: int = 0  # rows that compute one token of their request's output

    @property
    def is_empty(self) -> bool:
        """Whether workers would have nothing to do: it need not travel."""
        return not (self.request_ids or self.encode or self.drop)

    @property
    def num_tokens(self) -> int:
        return sum(self.num_scheduled_tokens)


@dataclass(frozen=True)
class StepResult:
    """What the workers report of a step."""

    step_id: int
    sampled: tuple[int, ...]  # a token id for each row of the plan that samples, in row order
    # embeddings that a worker lacked: rows that need them computed nothing
    missing: tuple[UnitKey, ...] = ()
    errors: dict[str, str] = field(default_factory=dict)  # request_id -> what went wrong in its row
    # request_id -> of the token that it drew, where it asks for that
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    # request_id -> index in its prompt -> of that token, where it asks for that
    prompt_logprobs: dict[str, dict[int, TokenLogprobs]] = field(default_factory=dict)


class RequestUpdate(NamedTuple):
    """What one step did for one request, for the output stage."""

    request_id: str
    new_token_ids: tuple[int, ...]
    status: RequestStatus
    error: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()  # of new_token_ids, where it asks for them
