"""Data exchanged between scheduler and workers in one step."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import RequestError
from .logprobs import TokenLogprobs
from .request import EncodeUnit, RequestStatus, UnitKey


@dataclass(frozen=True)
class EncodePlan:
    """An encode unit to run in this step, and the request that supplies its pixels."""

    unit: EncodeUnit
    request_id: str


@dataclass(frozen=True)
class StepPlan:
    """Work of one step.

    Per-row fields are parallel: one entry per row, one row per request.
    """

    step_id: int
    request_ids: tuple[str, ...]
    num_computed_tokens: tuple[int, ...]  # before this step
    num_scheduled_tokens: tuple[int, ...]  # tokens to compute now
    block_tables: tuple[array[int], ...]  # not copied: read before the next plan
    samples: tuple[bool, ...]  # the row reaches its last known token: sample the next
    # Index of the row's input token among the tokens sampled by the step in flight, whose value is
    # not known yet; -1 if the token is known. Empty if all are known.
    awaits: tuple[int, ...] = ()
    # (source, target) blocks. All sources are read before any write, and before the step's tokens.
    copies: tuple[tuple[int, int], ...] = ()
    encode: tuple[EncodePlan, ...] = ()  # units to encode, in order of need
    drop: tuple[UnitKey, ...] = ()  # embeddings to delete before encoding
    preempted: tuple[str, ...] = ()  # requests preempted while planning
    started: tuple[str, ...] = ()  # waiting requests that start in this step
    num_decode_tokens: int = 0  # rows that compute a single output token

    @property
    def is_empty(self) -> bool:
        """Return whether the workers have nothing to do; such a plan is not sent."""
        return not (self.request_ids or self.encode or self.drop)

    @property
    def num_tokens(self) -> int:
        return sum(self.num_scheduled_tokens)


@dataclass(frozen=True)
class StepResult:
    """Results that the workers report for one step."""

    step_id: int
    sampled: tuple[int, ...]  # one token id per sampling row, in row order
    # Embeddings that a worker lacks; rows that need them were skipped.
    missing: tuple[UnitKey, ...] = ()
    errors: dict[str, RequestError] = field(default_factory=dict)  # request_id -> error of its row
    # request_id -> logprobs of its sampled token, if requested
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    # request_id -> index in its prompt -> logprobs of that token, if requested
    prompt_logprobs: dict[str, dict[int, TokenLogprobs]] = field(default_factory=dict)


class RequestUpdate(NamedTuple):
    """Effect of one step on one request, for output processing."""

    request_id: str
    new_token_ids: tuple[int, ...]
    status: RequestStatus
    error: RequestError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # of new_token_ids, if requested
