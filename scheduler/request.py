"""A request and what the scheduler knows of it. Standard library alone.

Token ids are held as `array('i')`: a slice of them is bytes on the wire, and nothing here costs
more for a longer prompt than it must.
"""

from __future__ import annotations

import enum
import reprlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120

UnitKey = tuple[bytes, int]  # (media_hash, index of the encode unit in its item)

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 256


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH = "length"
    FINISHED_ABORTED = "abort"
    FINISHED_ERROR = "error"

    @property
    def is_finished(self) -> bool:
        return self.name.startswith("FINISHED")


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
    checkpoint's end tokens do; `ignore_eos` keeps going past the latter.
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
            value = getattr(self, name)
            if value is None:
                continue
            whole = isinstance(low, int)
            kinds = (int,) if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
                kind = "a whole number" if whole else "a finite number"
                raise ValueError(f"{name}={shown(value)}: must be {kind}")
            if not low <= value <= high:
                raise ValueError(f"{name}={shown(value)}: must be from {low} to {high}")
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


@dataclass(frozen=True)
class EncodeUnit:
    """What is encoded whole: an image, or a few temporal patches of a video."""

    media_hash: bytes  # SHA-256 of the item
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

    def units(self, max_temporal_patches: int) -> tuple[EncodeUnit, ...]:
        """Cuts the item in units of at most `max_temporal_patches`; an image is one unit."""
        frames, height, width = self.grid_thw
        tokens = self.num_tokens // frames
        return tuple(
            EncodeUnit(
                media_hash=self.media_hash,
                index=index,
                offset=self.offset + first * tokens,
                num_tokens=min(max_temporal_patches, frames - first) * tokens,
                num_patches=min(max_temporal_patches, frames - first) * height * width,
            )
            for index, first in enumerate(range(0, frames, max_temporal_patches))
        )


@dataclass(eq=False)
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
    mrope_positions: tuple[array[int], ...] = ()  # three of the prompt's length
    mrope_position_delta: int = 0  # position of token i past the prompt: i + delta
    max_tokens: int = 0  # the bound that holds, set at admission
    stop_token_ids: frozenset[int] = frozenset()  # the caller's and, unless ignored, the end tokens
    arrival: int = 0  # order of admission, set by the scheduler

    status: RequestStatus = RequestStatus.WAITING
    token_ids: array[int] = field(default_factory=lambda: array("i"))  # prompt, then output
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    block_table: array[int] = field(default_factory=lambda: array("i"))
    num_preemptions: int = 0
    error: str = ""

    def __post_init__(self) -> None:
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
