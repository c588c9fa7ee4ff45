"""Per-request parameters: token sampling and scheduling options.

All values are validated on construction; an `InputError` names the field, the value and its range.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypedDict, Unpack

from .errors import InputError
from .structured import StructuredOutput

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 256
MAX_N = 64  # outputs per prompt
MAX_LOGPROBS = 20  # top-k tokens per position
MAX_LOGIT_BIAS = 1024  # token ids
MAX_BAD_WORDS = 64
MAX_BAD_WORD_LENGTH = 256
MAX_SALT_LENGTH = 256
PRIORITIES = range(10)  # 0 is the highest
DEFAULT_PRIORITY = 5
MAX_TIMEOUT = 7 * 24 * 3600.0  # seconds


def truncated_repr(value: object) -> str:
    """Return a short repr of a caller's value for error texts."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return _REPR.repr(value)


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    None means "use the value from the checkpoint's generation_config.json". `temperature=0` is
    greedy; `top_k=0` or -1 and `top_p=1` disable those filters. With `seed=None` or -1 a seed is
    generated at admission. Output `i` of `n` is identical to that of a single request with
    `seed + i`.

    `stop` strings end the output and are not part of it unless `include_stop_str` is set.
    `stop_token_ids` end the output like the checkpoint's EOS tokens; `ignore_eos` ignores the
    latter. Before `min_tokens` output tokens, no EOS token, stop token or stop string ends it.

    `repetition_penalty` counts prompt and output tokens. `presence_penalty` (once per distinct
    token) and `frequency_penalty` (once per occurrence) are subtracted from the logits of output
    tokens; `logit_bias` is added afterwards. `bad_words` are never generated, with or without a
    leading space.

    `logprobs` and `prompt_logprobs` are the number of top-k tokens to return per token, computed
    from the model's raw logits; None returns nothing. With `skip_special_tokens=False` the text
    contains tokens such as `<|im_end|>`. `structured` constrains every output to a grammar.

    Raises `InputError` if a value is out of range or of the wrong type.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None  # None: up to max_model_len
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()  # normalized to pairs
    bad_words: Sequence[str] = ()
    min_tokens: int = 0
    include_stop_str: bool = False
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words"):
            value = getattr(self, name)
            if isinstance(value, str) and name != "stop_token_ids":
                value = (value,)
            if value is not None and not isinstance(value, list | tuple | set | frozenset):
                raise InputError(name, f"{name}={truncated_repr(value)}: must be a list")
            object.__setattr__(self, name, tuple(value or ()))
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        for name, off in (("top_k", 0), ("seed", None)):
            if type(getattr(self, name)) is int and getattr(self, name) == -1:  # as in vLLM
                object.__setattr__(self, name, off)
        self._check_numbers()
        self._check_stops()
        self._check_bad_words()
        if not isinstance(self.structured, StructuredOutput | None):
            text = "must be an octavo.StructuredOutput or None"
            value = truncated_repr(self.structured)
            raise InputError("structured", f"structured={value}: {text}")

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """Return `logit_bias` as normalized pairs (token id, bias)."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    def _check_numbers(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("seed", 0, 2**63 - 1),
            ("max_tokens", 1, 2**31 - 1),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), low, high)
        _check_number("n", self.n, 1, MAX_N)
        _check_number("min_tokens", self.min_tokens, 0, 2**31 - 1)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2.0, 2.0)
        for name in ("ignore_eos", "include_stop_str", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                value = truncated_repr(getattr(self, name))
                raise InputError(name, f"{name}={value}: must be true or false")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            text = f"must be at most max_tokens={self.max_tokens}"
            raise InputError("min_tokens", f"min_tokens={self.min_tokens}: {text}")
        if self.top_p == 0:
            text = "top_p=0: must be greater than 0; for greedy use temperature=0"
            raise InputError("top_p", text)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS or len(self.stop_token_ids) > MAX_STOP_STRINGS:
            raise InputError(
                "stop",
                f"{len(self.stop)} strings and {len(self.stop_token_ids)} token ids; "
                f"the maximum is {MAX_STOP_STRINGS} each",
            )
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                fix = f"must have 1 to {MAX_STOP_LENGTH} characters"
                raise InputError("stop", f"stop={truncated_repr(text)}: {fix}")
        for token in self.stop_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                text = f"stop_token_ids={truncated_repr(token)}: must be an integer >= 0"
                raise InputError("stop_token_ids", text)

    def _check_bad_words(self) -> None:
        if len(self.bad_words) > MAX_BAD_WORDS:
            text = f"the maximum is {MAX_BAD_WORDS}"
            raise InputError("bad_words", f"{len(self.bad_words)} strings; {text}")
        for word in self.bad_words:
            if not isinstance(word, str) or not 0 < len(word) <= MAX_BAD_WORD_LENGTH:
                text = f"must have 1 to {MAX_BAD_WORD_LENGTH} characters"
                raise InputError("bad_words", f"bad_words={truncated_repr(word)}: {text}")
            if word.isspace() or word.encode("utf-8", "ignore").decode() != word:
                text = "must be valid, non-blank text"
                raise InputError("bad_words", f"bad_words={truncated_repr(word)}: {text}")

    def with_defaults(self, defaults: SamplingParams) -> SamplingParams:
        """Return a copy with every field that is None taken from `defaults`."""
        chosen = {
            f.name: getattr(defaults, f.name) for f in fields(self) if getattr(self, f.name) is None
        }
        return replace(self, **chosen)


def _pairs(bias: object) -> tuple[tuple[int, float], ...]:
    """Return `logit_bias` as pairs (token id, bias), sorted by token id."""
    if isinstance(bias, Mapping):
        pairs = tuple(bias.items())
    elif bias is None or isinstance(bias, tuple):
        pairs = bias or ()
    else:
        text = "must be a dict {token id: bias}"
        raise InputError("logit_bias", f"logit_bias={truncated_repr(bias)}: {text}")
    if len(pairs) > MAX_LOGIT_BIAS:
        text = f"{len(pairs)} token ids; the maximum is {MAX_LOGIT_BIAS}"
        raise InputError("logit_bias", text)
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            text = "must be a pair (token id, bias)"
            raise InputError("logit_bias", f"logit_bias={truncated_repr(pair)}: {text}")
        _check_number("logit_bias: token id", pair[0], 0, 2**31 - 1)
        _check_number(f"logit_bias[{pair[0]}]", pair[1], -100.0, 100.0)
    ids = [token for token, _ in pairs]
    if len(set(ids)) < len(ids):
        raise InputError("logit_bias", "duplicate token id; give each id once")
    return tuple(sorted(pairs))


def _check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise `InputError` unless low <= value <= high.

    Only integers are accepted if `low` is an integer. `name`: the field, optionally with ": PART".
    """
    field = name.partition(":")[0]
    whole = isinstance(low, int)
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
        kind = "an integer" if whole else "a finite number"
        raise InputError(field, f"{name}={truncated_repr(value)}: must be {kind}")
    if not low <= value <= high:
        text = f"{name}={truncated_repr(value)}: must be from {low} to {high}"
        raise InputError(field, text)


class OptionFields(TypedDict, total=False):
    """Keyword arguments of `RequestOptions`."""

    priority: int
    timeout_s: float | None
    cache_salt: str


@dataclass(frozen=True)
class RequestOptions:
    """Scheduling options of one request, independent of its content.

    priority: 0 (highest) to 9. Waiting requests age, so lower priorities never starve.
    timeout_s: Seconds from submission. A request that is unfinished by then ends with the error
        DEADLINE_EXCEEDED and the output generated so far.
    cache_salt: Requests share cached prefixes and image embeddings only if their salts are equal.
    """

    priority: int = DEFAULT_PRIORITY
    timeout_s: float | None = None
    cache_salt: str = ""

    @classmethod
    def of(cls, **given: Unpack[OptionFields]) -> RequestOptions:
        """Create options from keyword arguments; None selects the default.

        Raises TypeError for an unknown name.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                text = f"options are {', '.join(known)}; n and the like belong to SamplingParams"
                raise TypeError(f"{name}: unknown option; {text}")
        return cls(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        _check_number("priority", self.priority, PRIORITIES[0], PRIORITIES[-1])
        if self.timeout_s is not None:
            _check_number("timeout_s", self.timeout_s, 0.0, MAX_TIMEOUT)  # 0: already expired
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT_LENGTH:
            text = f"must be a string of at most {MAX_SALT_LENGTH} characters"
            raise InputError("cache_salt", f"cache_salt={truncated_repr(self.cache_salt)}: {text}")
