"""A request and its scheduling state. Standard library only.

Token ids are stored as `array('i')`, whose slices serialize directly to bytes.
"""

from __future__ import annotations

import enum
import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

from .errors import RequestError
from .logprobs import LogprobTable
from .params import DEFAULT_PRIORITY, SamplingParams

UnitKey = tuple[bytes, int]  # (media_hash, index of the encode unit in its item)
ALL_TOKENS = 1 << 62


class RequestStatus(enum.Enum):
    """State of a request; the finished states' values are finish reasons."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH = "length"
    FINISHED_ABORTED = "abort"
    FINISHED_ERROR = "error"

    def __init__(self, value: str) -> None:
        self.is_finished = value not in ("waiting", "running", "preempted")


@dataclass(frozen=True)
class EncodeUnit:
    """The unit of vision encoding: an image, or a few temporal patches of a video."""

    media_hash: bytes  # SHA-256 of pixels and salt; empty while the pixels are being processed
    index: int  # in its item
    offset: int  # first placeholder token in the prompt
    num_tokens: int  # embeddings, one per placeholder
    num_patches: int  # encoding cost

    @property
    def key(self) -> UnitKey:
        return (self.media_hash, self.index)

    @property
    def end(self) -> int:
        return self.offset + self.num_tokens


@dataclass(frozen=True)
class MediaSpan:
    """Position of an image or video in the prompt: [offset, offset + num_tokens)."""

    offset: int
    num_tokens: int
    grid_thw: tuple[int, int, int]  # patches before merging

    def units(self, max_temporal_patches: int) -> tuple[EncodeUnit, ...]:
        """Split the item into units of at most `max_temporal_patches`; an image is one unit.

        The units have no media hash until `Request.supply` sets it.
        """
        frames, height, width = self.grid_thw
        tokens = self.num_tokens // frames
        return tuple(
            EncodeUnit(
                media_hash=b"",
                index=index,
                offset=self.offset + first * tokens,
                num_tokens=min(max_temporal_patches, frames - first) * tokens,
                num_patches=min(max_temporal_patches, frames - first) * height * width,
            )
            for index, first in enumerate(range(0, frames, max_temporal_patches))
        )


def salted(media_hash: bytes, cache_salt: bytes) -> bytes:
    """Return the unit's hash under a salt; different salts never share an embedding."""
    if not cache_salt:
        return media_hash
    size = len(cache_salt).to_bytes(8, "little")
    return sha256(b"octavo.salted.v1" + size + cache_salt + media_hash).digest()


@dataclass(eq=False, slots=True)
class Request:
    """State of one request. Only the scheduler mutates it, except for `supply`.

    Keys and values of token ids [0, num_computed_tokens) are in blocks, as reported by the
    workers. [num_computed_tokens, num_sent_tokens) are in steps in flight, which also sample
    `num_awaited_tokens` tokens that are not known yet. The remaining tokens are not scheduled.
    """

    request_id: str
    prompt_token_ids: array[int]
    params: SamplingParams  # defaults applied: only max_tokens may be None
    units: tuple[EncodeUnit, ...] = ()  # in prompt order
    cache_salt: bytes = b""
    priority: int = DEFAULT_PRIORITY
    deadline: float = math.inf  # on the scheduler's clock
    parent: Request | None = None  # request with the same prompt, until this one starts
    mrope_positions: tuple[array[int], ...] = ()  # three arrays of the prompt's length
    mrope_position_delta: int = 0  # position of output token i: i + delta
    stop_token_ids: frozenset[int] = frozenset()  # the caller's and, unless ignored, EOS tokens
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences never generated

    # Set by the scheduler.
    max_tokens: int = 0  # effective limit, set at admission
    urgency: tuple[float, int] = (0.0, 0)  # smaller runs first: (due time, arrival index)
    status: RequestStatus = RequestStatus.WAITING
    token_ids: array[int] = field(default_factory=lambda: array("i"))  # prompt, then output
    num_computed_tokens: int = 0
    num_sent_tokens: int = 0
    num_awaited_tokens: int = 0
    sample_index: int = -1  # index among the tokens sampled by its latest step
    num_cached_tokens: int = 0  # prefix-cache hit, in prompt tokens
    block_table: array[int] = field(default_factory=lambda: array("i"))
    block_hashes: list[bytes] = field(
        default_factory=list
    )  # of its full blocks, computed on demand
    # Of the prompt's first tokens, if requested; None for the first token and for placeholders.
    prompt_logprobs: LogprobTable = field(default_factory=LogprobTable)
    num_preemptions: int = 0
    num_kills: int = 0  # worker crashes in its steps since it last ran alone without one
    num_misses: int = 0  # consecutive steps that lacked an embedding
    error: RequestError | None = None
    has_penalty: bool = field(init=False)
    has_counts: bool = field(init=False)  # presence or frequency penalty
    has_edits: bool = field(init=False)  # logits of single tokens are edited
    biased_token_ids: array[int] = field(init=False)
    biases: array[float] = field(init=False)  # parallel to biased_token_ids
    is_guided: bool = field(
        init=False
    )  # structured output: the next mask depends on the last token
    is_plain: bool = field(init=False)  # no counts, edits, structured output or logprobs
    media_end: int = field(init=False)  # first token after the last unit
    num_ready_units: int = field(init=False)  # units with pixels
    num_ready_tokens: int = field(init=False)  # tokens before the first unit without pixels

    def __post_init__(self) -> None:
        self.media_end = self.units[-1].end if self.units else 0
        params = self.params
        self.has_counts = params.presence_penalty != 0 or params.frequency_penalty != 0
        self.has_penalty = self.has_counts or params.repetition_penalty != 1
        self.has_edits = bool(params.logit_bias or self.bad_words or params.min_tokens)
        self.biased_token_ids = array("i", [token for token, _ in params.biases])
        self.biases = array("f", [bias for _, bias in params.biases])
        asks = params.logprobs is not None or params.prompt_logprobs is not None
        self.is_guided = params.structured is not None
        self.is_plain = not (self.has_counts or self.has_edits or self.is_guided or asks)
        self._count_ready()
        if not self.token_ids:
            self.token_ids = array("i", self.prompt_token_ids)

    def supply(self, media_hashes: Sequence[bytes]) -> None:
        """Set the media hashes of the next units, whose pixels are ready, between two plans."""
        first, count = self.num_ready_units, len(media_hashes)
        ready = tuple(
            replace(unit, media_hash=salted(media_hash, self.cache_salt))
            for unit, media_hash in zip(self.units[first:], media_hashes, strict=False)
        )
        assert len(ready) == count, "more media hashes than units"
        self.units = (*self.units[:first], *ready, *self.units[first + count :])
        self._count_ready()

    def _count_ready(self) -> None:
        ready = self.num_ready_units = sum(unit.media_hash != b"" for unit in self.units)
        self.num_ready_tokens = self.units[ready].offset if ready < len(self.units) else ALL_TOKENS

    @property
    def awaits_media(self) -> bool:
        """Return whether the pixels of some unit are still being processed."""
        return self.num_ready_tokens < ALL_TOKENS

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """Return whether requested prompt logprobs are still incomplete."""
        if self.params.prompt_logprobs is None:
            return False
        return len(self.prompt_logprobs) < len(self.prompt_token_ids)

    @property
    def num_skippable_tokens(self) -> int:
        """Return the number of tokens that a prefix-cache hit may skip.

        Tokens whose logits are needed for prompt logprobs must be computed.
        """
        if self.awaits_prompt_logprobs:
            return max(0, len(self.prompt_logprobs) - 1)
        return min(len(self.token_ids), self.num_ready_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_left(self) -> int:
        """Return the number of tokens that the next step may schedule.

        These are known tokens and, except with structured output, tokens in flight, up to the
        first unit without pixels. The last output token is never computed.
        """
        if self.num_ready_tokens < ALL_TOKENS:
            return self.num_ready_tokens - self.num_sent_tokens
        known = len(self.token_ids)
        if not self.is_guided:
            known += self.num_awaited_tokens
        last = len(self.prompt_token_ids) + self.max_tokens - 1
        return (known if known < last else last) - self.num_sent_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> Sequence[int]:
        return self.token_ids[len(self.prompt_token_ids) :]


def overlapping(units: tuple[EncodeUnit, ...], start: int, end: int) -> Iterator[EncodeUnit]:
    """Yield the units that overlap tokens [start, end); `units` are sorted and disjoint."""
    for index in range(bisect_right(units, start, key=lambda unit: unit.end), len(units)):
        if units[index].offset >= end:
            return
        yield units[index]
