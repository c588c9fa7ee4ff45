"""A request and what the scheduler knows of it. Standard library alone.

Token ids are held as `array('i')`: a slice of them is bytes on the wire, and nothing here costs
more for a longer prompt than it must.
"""

from __future__ import annotations

import enum
import math
import reprlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from typing import TypedDict

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120

UnitKey = tuple[bytes, int]  # (media_hash, index of the encode unit in its item)

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 256
MAX_N = 64  # answers to one prompt
MAX_SALT_LENGTH = 256
PRIORITIES = range(10)  # 0 is the most urgent
DEFAULT_PRIORITY = 5
MAX_TIMEOUT = 7 * 24 * 3600.0  # seconds


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


def shown(value: object) -> str:
    """A caller's value for an error's text: never long."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length()} bits"
    return _REPR.repr(value)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. None means "as the checkpoint's generation_config.json says".

    temperature 0 is greedy. top_k 0 and top_p 1 switch those filters off. `seed` None draws one
    at admission. `stop` strings are never shown; `stop_token_ids` end the output as the
    checkpoint's end tokens do; `ignore_eos` keeps going past the latter. `n` answers share one
    prompt; answer i is what a request alone gets with seed + i.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None  # None: up to the model's length
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if value is not None and not isinstance(value, list | tuple | set | frozenset):
                raise ValueError(f"{name}={shown(value)}: must be a list")
            object.__setattr__(self, name, tuple(value or ()))
        self._check_numbers()
        self._check_stops()

    def _check_numbers(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("seed", 0, 2**63 - 1),
            ("max_tokens", 1, 2**31 - 1),
        ):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), low, high)
        _check_number("n", self.n, 1, MAX_N)
        if self.top_p == 0:
            raise ValueError("top_p=0: must be over 0; temperature=0 is greedy")

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS or len(self.stop_token_ids) > MAX_STOP_STRINGS:
            raise ValueError(f"stop: at most {MAX_STOP_STRINGS} stop strings and token ids")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise ValueError(f"stop={shown(text)}: 1 to {MAX_STOP_LENGTH} characters each")
        for token in self.stop_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ValueError(f"stop_token_ids={shown(token)}: must be token ids")

    def with_defaults(self, defaults: SamplingParams) -> SamplingParams:
        """Fills every field that is None from `defaults`."""
        chosen = {
            f.name: getattr(defaults, f.name) for f in fields(self) if getattr(self, f.name) is None
        }
        return replace(self, **chosen)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    """Raises ValueError unless low <= value <= high; whole numbers where `low` is one."""
    whole = isinstance(low, int)
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
        kind = "a whole number" if whole else "a finite number"
        raise ValueError(f"{name}={shown(value)}: must be {kind}")
    if not low <= value <= high:
        raise ValueError(f"{name}={shown(value)}: must be from {low} to {high}")


class OptionFields(TypedDict, total=False):
    """The keyword arguments that make `RequestOptions`."""

    priority: int
    timeout_s: float | None
    cache_salt: str


@dataclass(frozen=True)
class RequestOptions:
    """How a request is to be treated, whatever it says.

    priority: 0, the most urgent, to 9. A request gains on later ones as it waits, so that none
    waits for ever.
    timeout_s: seconds from the call on; a request that is not done by then ends with the error
    DEADLINE_EXCEEDED and what it has.
    cache_salt: requests find each other's cached prefixes and images only under the same salt.
    """

    priority: int = DEFAULT_PRIORITY
    timeout_s: float | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        _check_number("priority", self.priority, PRIORITIES[0], PRIORITIES[-1])
        if self.timeout_s is not None:
            _check_number("timeout_s", self.timeout_s, 0.0, MAX_TIMEOUT)
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT_LENGTH:
            text = f"must be a text of at most {MAX_SALT_LENGTH} characters"
            raise ValueError(f"cache_salt={shown(self.cache_salt)}: {text}")


@dataclass(frozen=True)
class EncodeUnit:
    """What is encoded whole: an image, or a few temporal patches of a video."""

    media_hash: bytes  # SHA-256 of the item, and of the caller's salt where there is one
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
    media_hash: bytes

    def units(self, max_temporal_patches: int, cache_salt: bytes = b"") -> tuple[EncodeUnit, ...]:
        """Cuts the item in units of at most `max_temporal_patches`; an image is one unit."""
        frames, height, width = self.grid_thw
        tokens = self.num_tokens // frames
        name = salted(self.media_hash, cache_salt)
        return tuple(
            EncodeUnit(
                media_hash=name,
                index=index,
                offset=self.offset + first * tokens,
                num_tokens=min(max_temporal_patches, frames - first) * tokens,
                num_patches=min(max_temporal_patches, frames - first) * height * width,
            )
            for index, first in enumerate(range(0, frames, max_temporal_patches))
        )


def salted(media_hash: bytes, cache_salt: bytes) -> bytes:
    """What an item is called under a salt: other salts' requests never find its embeddings."""
    if not cache_salt:
        return media_hash
    size = len(cache_salt).to_bytes(8, "little")
    return sha256(b"octavo.salted.v1" + size + cache_salt + media_hash).digest()


@dataclass(eq=False, slots=True)
class Request:
    """One request's state. Mutated by the scheduler alone.

    Token ids [0, num_computed_tokens) have their keys and values in blocks; of the rest,
    [num_computed_tokens, num_tokens) are known and still to compute.
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

    # From here on set by the scheduler.
    max_tokens: int = 0  # the bound that holds, set at admission
    urgency: tuple[float, int] = (0.0, 0)  # least goes first; the second is the order of arrival
    status: RequestStatus = RequestStatus.WAITING
    token_ids: array[int] = field(default_factory=lambda: array("i"))  # prompt, then output
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    block_table: array[int] = field(default_factory=lambda: array("i"))
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as asked
    num_preemptions: int = 0
    num_misses: int = 0  # steps on end that lacked an embedding
    error: str = ""
    media_end: int = field(init=False)  # first token after the last unit

    def __post_init__(self) -> None:
        self.media_end = self.units[-1].end if self.units else 0
        if not self.token_ids:
            self.token_ids = array("i", self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

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
