"""What a caller may ask of a request: how to choose tokens, and how to be treated. All is checked
here, once, into a ValueError that names the field, the value and what it may be."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, fields, replace
from typing import TypedDict, Unpack

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 256
MAX_N = 64  # answers to one prompt
MAX_SALT_LENGTH = 256
PRIORITIES = range(10)  # 0 is the most urgent
DEFAULT_PRIORITY = 5
MAX_TIMEOUT = 7 * 24 * 3600.0  # seconds


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

    @classmethod
    def of(cls, **given: Unpack[OptionFields]) -> RequestOptions:
        """From keyword arguments; None is the default. Raises TypeError for a name that is none."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                text = f"a request has {', '.join(known)}; n and the like are SamplingParams'"
                raise TypeError(f"{name}: unknown; {text}")
        return cls(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        _check_number("priority", self.priority, PRIORITIES[0], PRIORITIES[-1])
        if self.timeout_s is not None:
            _check_number("timeout_s", self.timeout_s, 0.0, MAX_TIMEOUT)  # 0: it has run out
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT_LENGTH:
            text = f"must be a text of at most {MAX_SALT_LENGTH} characters"
            raise ValueError(f"cache_salt={shown(self.cache_salt)}: {text}")
