"""A request and what the scheduler knows of it. Standard library alone.

Token ids are held as `array('i')`: a slice of them is bytes on the wire, and nothing here costs
more for a longer prompt than it must.
"""

from __future__ import annotations

import enum
import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

from .logprobs import LogprobTable
from .params import DEFAULT_PRIORITY, SamplingParams

UnitKey = tuple[bytes, int]  # (media_hash, index of the encode unit in its item)
ALL_TOKENS = 1 << 62


class RequestStatus(enum.Enum):
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
    """What is encoded whole: an image, or a few temporal patches of a video."""

    media_hash: bytes  # SHA-256 of its pixels, and of the caller's salt where there is one; empty
    # while they are being made
    index: int  # of this unit in its item
    offset: int  # first placeholder token in the prompt
    num_tokens: int  # embeddings it makes, one a placeholder
    num_patches: int  # what encoding it costs

    @property
    def key(self) -> UnitKey:
        return (self.media_hash, self.index)

    @property
    def end(self) -> int:
        return self.offset + self.num_tokens


@dataclass(frozen=True)
class MediaSpan:
    """Where an image or a video lies in the prompt: [offset, offset + num_tokens)."""

    offset: int
    num_tokens: int
    grid_thw: tuple[int, int, int]  # in patches, before merging

    def units(self, max_temporal_patches: int) -> tuple[EncodeUnit, ...]:
        """Cuts the item in units of at most `max_temporal_patches`, whose pixels are still to come;
        an image is one unit."""
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
    """What a unit is called under a salt: other salts' requests never find its embedding."""
    if not cache_salt:
        return media_hash
    size = len(cache_salt).to_bytes(8, "little")
    return sha256(b"octavo.salted.v1" + size + cache_salt + media_hash).digest()


@dataclass(eq=False, slots=True)
class Request:
    """One request's state. Mutated by the scheduler alone, but for `supply`.

    Token ids [0, num_computed_tokens) have their keys and values in blocks, as the workers have
    reported; [num_computed_tokens, num_sent_tokens) are in steps on their way, which also draw
    `num_awaited_tokens` that are not yet known; the rest no step has taken up.
    """

    request_id: str
    prompt_token_ids: array[int]
    params: SamplingParams  # resolved: no None but max_tokens
    units: tuple[EncodeUnit, ...] = ()  # in prompt order
    cache_salt: bytes = b""
    priority: int = DEFAULT_PRIORITY
    deadline: float = math.inf  # on the scheduler's clock
    parent: Request | None = None  # whose prompt this one shares; None once it has begun
    mrope_positions: tuple[array[int], ...] = ()  # three of the prompt's length
    mrope_position_delta: int = 0  # position of token i past the prompt: i + delta
    stop_token_ids: frozenset[int] = frozenset()  # the caller's and, unless ignored, the end tokens
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids never drawn one after the other

    # From here on set by the scheduler.
    max_tokens: int = 0  # the bound that holds, set at admission
    urgency: tuple[float, int] = (0.0, 0)  # the smaller goes first: (due time, order of arrival)
    status: RequestStatus = RequestStatus.WAITING
    token_ids: array[int] = field(default_factory=lambda: array("i"))  # prompt, then output
    num_computed_tokens: int = 0
    num_sent_tokens: int = 0
    num_awaited_tokens: int = 0
    sample_index: int = -1  # its place among the tokens that its latest step draws
    num_cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    block_table: array[int] = field(default_factory=lambda: array("i"))
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as asked
    # Of the prompt's first tokens, as far as steps have told; the first token, and those of media,
    # have none. Only where `params` asks for them.
    prompt_logprobs: LogprobTable = field(default_factory=LogprobTable)
    num_preemptions: int = 0
    num_kills: int = 0  # steps with it that ended the workers, since it last ran well alone
    num_misses: int = 0  # steps in a row that lacked an embedding
    error: str = ""
    has_penalty: bool = field(init=False)
    has_counts: bool = field(init=False)  # a penalty that goes by how often it has had a token
    has_edits: bool = field(init=False)  # something is added to single tokens' logits
    biased_token_ids: array[int] = field(init=False)
    biases: array[float] = field(init=False)  # one for each of them
    is_guided: bool = field(init=False)  # what may come next depends on its last token
    is_plain: bool = field(init=False)  # none of these three, and no log probabilities
    media_end: int = field(init=False)  # first token after the last unit
    num_ready_units: int = field(init=False)  # whose pixels are there
    num_ready_tokens: int = field(init=False)  # before the first unit whose pixels are not

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
        """The pixels of its next units are there: to be told between two plans."""
        first, count = self.num_ready_units, len(media_hashes)
        ready = tuple(
            replace(unit, media_hash=salted(media_hash, self.cache_salt))
            for unit, media_hash in zip(self.units[first:], media_hashes, strict=False)
        )
        assert len(ready) == count, "more units than the request has"
        self.units = (*self.units[:first], *ready, *self.units[first + count :])
        self._count_ready()

    def _count_ready(self) -> None:
        ready = self.num_ready_units = sum(unit.media_hash != b"" for unit in self.units)
        self.num_ready_tokens = self.units[ready].offset if ready < len(self.units) else ALL_TOKENS

    @property
    def awaits_media(self) -> bool:
        """Whether pixels of some unit are still being made."""
        return self.num_ready_tokens < ALL_TOKENS

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """Whether it asks for them, and some are still to be computed."""
        if self.params.prompt_logprobs is None:
            return False
        return len(self.prompt_logprobs) < len(self.prompt_token_ids)

    @property
    def num_skippable_tokens(self) -> int:
        """Tokens that need no computing where others have: not those whose logits it waits for."""
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
        """Tokens that the next step may take up: known, or drawn by a step on its way, and before
        what still awaits its pixels. Where it is guided, none before it is known. The last that the
        request may have is never computed."""
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
    """The units that have a token in [start, end), in order; `units` are disjoint and sorted."""
    for index in range(bisect_right(units, start, key=lambda unit: unit.end), len(units)):
        if units[index].offset >= end:
            return
        yield units[index]
