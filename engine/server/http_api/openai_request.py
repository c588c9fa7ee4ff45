"""Convert OpenAI's request bodies to prompts, sampling parameters and options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn, cast

from ....scheduler.params import (
    MAX_LOGPROBS,
    OptionFields,
    RequestOptions,
    SamplingParams,
    truncated_repr,
)
from ...errors import InputError
from ...input.parsed_prompt import ParsedPrompt
from ...input.prompt import PLACEHOLDER
from ...tool_calling.schema import TOOL_FIELDS
from ...utils.json_reader import TooManyParts
from ...utils.json_reader import read_json as read_value
from ...utils.openai_fields import REQUEST, STREAM_OPTIONS
from ..errors import RequestRejected
from .errors import ApiError
from .openai_structured import read_structured

MAX_PROMPTS = 64  # per completions request
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions

# Fields of SamplingParams are passed on, except `structured`: OpenAI's names for it differ.
PARAMS = {e.name: e.default for e in fields(SamplingParams) if e.name != "structured"}
OPTIONS = tuple(each.name for each in fields(RequestOptions))
NOT_SAMPLING = {"model", "stream"} | {each.name for each in REQUEST if each.is_ignored}
# Values that have no effect, by field; other values of unsupported fields are rejected.
NEUTRAL = {each.name: each.neutral for each in REQUEST if each.neutral is not None}
STREAM_FIELDS = frozenset(each.name for each in STREAM_OPTIONS)
# vLLM's fields with another name here, for a helpful error.
RENAMED = {
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "include_stop_str_in_output": "include_stop_str",
    "request_id": "the header x-request-id",
}


@dataclass(frozen=True)
class ParsedRequest:
    """A parsed chat or completions request with valid structure."""

    prompts: tuple[ParsedPrompt, ...]  # for `AsyncLLM.generate`
    params: SamplingParams
    options: OptionFields
    stream: bool
    include_usage: bool  # in a last chunk of the stream
    continuous_usage: bool = False  # in every chunk of the stream
    form_field: str = ""  # the field with the structured output constraint, if any
    body: Mapping[str, Any] = field(default_factory=dict)  # the original body

    @property
    def form_of(self) -> str:
        """The field that causes structured output: `form_field`, or else `tool_choice`."""
        return self.form_field or "tool_choice"


def read_json(body: bytes) -> dict[str, Any]:
    """Parse a body, which must be a JSON object. Raises `ApiError`."""
    try:
        found = read_value(body)
    except TooManyParts as error:
        raise ApiError(413, f"the body has too many JSON values: {error}") from None
    except ValueError:
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(found).__name__}")
    return found


def read_request(
    body: bytes,
    names: Sequence[str],
    read: Callable[[Mapping[str, Any], Sequence[str]], ParsedRequest],
) -> ParsedRequest:
    """Read a body with `read_chat` or `read_completions`. Raises what they raise."""
    written = read_json(body)
    return replace(read(written, names), body=written)


def read_chat(body: Mapping[str, Any], names: Sequence[str]) -> ParsedRequest:
    """Read a chat request. Raises `InputError`, `ApiError` or `RequestRejected`."""
    check_model(body, names)
    given = dict(body)
    asked = {name: given.pop(name, None) for name in ("messages", *TOOL_FIELDS)}
    prompt = ParsedPrompt.of(asked, from_json=True)
    newer = given.pop("max_completion_tokens", None)
    if newer is not None:
        if given.get("max_tokens") not in (None, newer):
            raise InputError(
                "max_completion_tokens", "conflicts with max_tokens, its old name; set only one"
            )
        given["max_tokens"] = newer
    given["logprobs"] = _read_chat_logprobs(given)
    return _build_request((prompt,), given)


def read_completions(body: Mapping[str, Any], names: Sequence[str]) -> ParsedRequest:
    """Read a completions request. Raises `InputError`, `ApiError` or `RequestRejected`."""
    check_model(body, names)
    given = dict(body)
    prompts = _read_prompts(given.pop("prompt", None))
    if given.get("max_tokens") is None:
        given["max_tokens"] = COMPLETION_TOKENS
    return _build_request(prompts, given)


def _read_chat_logprobs(given: dict[str, Any]) -> Any:
    """Return the number of alternatives. Chats have a flag and a separate `top_logprobs`."""
    top = given.pop("top_logprobs", None)
    if top is not None and (type(top) is not int or not 0 <= top <= MAX_LOGPROBS):
        text = f"{truncated_repr(top)}: must be an integer from 0 to {MAX_LOGPROBS}"
        raise InputError("top_logprobs", text)
    if read_flag(given, "logprobs"):
        return top or 0
    if top:
        raise InputError("top_logprobs", "requires logprobs=true")
    return None


def check_model(body: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check that `model` is a served name, empty or absent.

    Raises `InputError` or `RequestRejected`.
    """
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise InputError("model", f"{truncated_repr(model)}: must be a string")
    if model not in (None, "", *names):
        text = f"model={truncated_repr(model)}: unknown; use one of {', '.join(names)}"
        raise RequestRejected("NOT_FOUND", text, "model")


def read_flag(given: Mapping[str, Any], name: str) -> bool:
    """Return a boolean field; False if absent. Raises `InputError`."""
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(name, f"{truncated_repr(value)}: must be true or false")
    return bool(value)


def _read_prompts(prompt: Any) -> tuple[ParsedPrompt, ...]:
    """Read `prompt`: a string, token ids, or a list of either. Raises `InputError`."""
    if isinstance(prompt, str):
        return (ParsedPrompt(prompt),)
    if not isinstance(prompt, list) or not prompt:
        raise InputError("prompt", "must be a string, a list of token ids, or a list of either")
    if all(isinstance(each, int) for each in prompt):
        return (ParsedPrompt(prompt),)
    if len(prompt) > MAX_PROMPTS:
        raise InputError("prompt", f"has {len(prompt)} prompts; the maximum is {MAX_PROMPTS}")
    for each in prompt:
        if not isinstance(each, str | list):
            raise InputError(
                "prompt", f"{truncated_repr(each)}: must be a string or a list of token ids"
            )
    return tuple(map(ParsedPrompt, prompt))


def _build_request(prompts: tuple[ParsedPrompt, ...], given: dict[str, Any]) -> ParsedRequest:
    """Build the request. `given`: the other fields of the body."""
    stream = read_flag(given, "stream")
    usage = _read_stream_options(given.pop("stream_options", None), stream)
    form, form_field = read_structured(given)
    sampling: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or name in NOT_SAMPLING or _is_neutral(name, value):
            continue
        if name in OPTIONS:
            options[name] = value
        elif name in PARAMS:
            sampling[name] = _read_param(name, value, given)
        else:
            _reject(name)
    RequestOptions(**options)
    params = SamplingParams(**sampling, structured=form)
    typed_options = cast(OptionFields, options)
    return ParsedRequest(prompts, params, typed_options, stream, *usage, form_field)


def _read_stream_options(given: Any, stream: bool) -> tuple[bool, bool]:
    """Return (whether to send usage at the end, whether to send it in each chunk)."""
    if given is None:
        return False, False
    if not isinstance(given, dict) or not stream:
        raise InputError("stream_options", "must be an object, and requires stream=true")
    for name in given:
        if name not in STREAM_FIELDS:
            _reject(f"stream_options.{name}")
    return read_flag(given, "include_usage"), read_flag(given, "continuous_usage_stats")


def _is_neutral(name: str, value: Any) -> bool:
    """Return whether a field's value has no effect. 0 and false are different values."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool)
        for each in NEUTRAL.get(name, ())
    )


def _read_param(name: str, value: Any, given: Mapping[str, Any]) -> Any:
    """Convert a field to the type in `SamplingParams`."""
    if isinstance(PARAMS[name], bool):
        return read_flag(given, name)
    if name == "logit_bias":
        return _read_bias(value)
    return value


def _read_bias(given: Any) -> dict[int, float]:
    """Convert JSON's string keys to token ids."""
    if not isinstance(given, dict):
        raise InputError("logit_bias", "must be an object that maps token ids to numbers")
    for token in given:
        if not token.isdecimal() or len(token) > 9:
            raise InputError("logit_bias", f"{truncated_repr(token)}: keys must be token ids")
    return {int(token): bias for token, bias in given.items()}


def _reject(name: str) -> NoReturn:
    if name in RENAMED:
        text = f"{name}: not supported; use {RENAMED[name]}"
        raise ApiError(400, text, param=name, code="unsupported_parameter")
    if name in NEUTRAL:
        text = f"{name}: not supported; remove it"
        raise ApiError(400, text, param=name, code="unsupported_parameter")
    text = f"{truncated_repr(name)}: unknown field; remove it"
    raise ApiError(400, text, param=name, code="unknown_parameter")


@contextmanager
def named_as_written(body: Mapping[str, Any]) -> Iterator[None]:
    """Map field names in errors of a parsed request back to those in its `body`."""
    try:
        yield
    except InputError as error:
        raise as_written(error, body) from None


def as_written(error: InputError, body: Mapping[str, Any]) -> InputError:
    """Return the error with the field name of `body`, a request that was parsed."""
    if error.field.startswith(PLACEHOLDER):
        text = f"has {PLACEHOLDER}, a media placeholder; use /v1/chat/completions for media"
        return InputError("prompt", text)
    if error.field != "prompt_token_ids":
        return error
    field = "tokens" if "tokens" in body else "prompt"
    return type(error)(field, field + str(error).removeprefix(error.field))
