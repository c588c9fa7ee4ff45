"""Bodies of OpenAI's requests to prompts and sampling settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from ...tool_calling.schema import TOOL_FIELDS
from ...utils.json_reader import TooManyParts
from ...utils.json_reader import read_json as read_value
from ...utils.openai_fields import REQUEST, STREAM_OPTIONS
from ..errors import RequestRejected, field_in
from .errors import ApiError
from .openai_messages import read_messages
from .openai_structured import read_structured

MAX_PROMPTS = 64  # of one request for completions
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens, for completions alone

# A field that SamplingParams has is passed on; forms of answers go by other names.
PARAMS = {e.name: e.default for e in fields(SamplingParams) if e.name != "structured"}
OPTIONS = tuple(each.name for each in fields(RequestOptions))
NOT_SAMPLING = {"model", "stream"} | {each.name for each in REQUEST if each.is_ignored}
# Fields that ask for nothing at these values. Others are rejected where they are not supported.
NEUTRAL = {each.name: each.neutral for each in REQUEST if each.neutral is not None}
STREAM_FIELDS = frozenset(each.name for each in STREAM_OPTIONS)
# Fields of vLLM's that have another name here: left out, they would be missed.
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
    """A request for answers, checked as far as its form goes."""

    prompts: tuple[Mapping[str, Any], ...]  # each as `AsyncLLM.generate` takes it
    params: SamplingParams
    options: OptionFields
    stream: bool
    include_usage: bool  # at the end of the stream
    continuous_usage: bool = False  # in every chunk of the stream
    form_field: str = ""  # where the answers' form stands, if they are to have one
    body: Mapping[str, Any] = field(default_factory=dict)  # as it was written

    @property
    def form_of(self) -> str:
        """The field that asks for a form: `tool_choice` where none says one."""
        return self.form_field or "tool_choice"


def read_json(body: bytes) -> dict[str, Any]:
    """Return a body's object. Raises `ApiError`."""
    try:
        found = read_value(body)
    except TooManyParts as error:
        raise ApiError(413, f"the body has too many parts: {error}") from None
    except ValueError:
        raise ApiError(400, "the body is not JSON") from None
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
    """Of /v1/chat/completions. Raises `InputError`, `ApiError` or `RequestRejected`."""
    check_model(body, names)
    given = dict(body)
    messages = read_messages(given.pop("messages", None))
    newer = given.pop("max_completion_tokens", None)
    if newer is not None:
        if given.get("max_tokens") not in (None, newer):
            raise InputError("max_completion_tokens", "is max_tokens' new name: give one of them")
        given["max_tokens"] = newer
    given["logprobs"] = _read_chat_logprobs(given)
    tools = {name: given.pop(name, None) for name in TOOL_FIELDS}
    return _asked(({"messages": messages, **tools},), given)


def read_completions(body: Mapping[str, Any], names: Sequence[str]) -> ParsedRequest:
    """Of /v1/completions. Raises `InputError`, `ApiError` or `RequestRejected`."""
    check_model(body, names)
    given = dict(body)
    prompts = _read_prompts(given.pop("prompt", None))
    if given.get("max_tokens") is None:
        given["max_tokens"] = COMPLETION_TOKENS
    return _asked(prompts, given)


def _read_chat_logprobs(given: dict[str, Any]) -> Any:
    """In chats a flag, and their number apart."""
    top = given.pop("top_logprobs", None)
    if top is not None and (type(top) is not int or not 0 <= top <= MAX_LOGPROBS):
        text = f"{truncated_repr(top)}: must be a whole number from 0 to {MAX_LOGPROBS}"
        raise InputError("top_logprobs", text)
    if read_flag(given, "logprobs"):
        return top or 0
    if top:
        raise InputError("top_logprobs", "goes with logprobs=true")
    return None


def check_model(body: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check that `model` is one of the served names; an empty or absent one means the model that
    is served. Raises `InputError` or `RequestRejected`."""
    asked = body.get("model")
    if asked is not None and not isinstance(asked, str):
        raise InputError("model", f"{truncated_repr(asked)}: must be a text")
    if asked not in (None, "", *names):
        text = f"model={truncated_repr(asked)}: this server has {', '.join(names)}"
        raise RequestRejected("NOT_FOUND", text, "model")


def read_flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(name, f"{truncated_repr(value)}: must be true or false")
    return bool(value)


def _read_prompts(prompt: Any) -> tuple[dict[str, Any], ...]:
    """A text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return ({"prompt": prompt},)
    if not isinstance(prompt, list) or not prompt:
        raise InputError("prompt", "give a text, a list of token ids, or a list of either")
    if all(isinstance(each, int) for each in prompt):
        return ({"prompt_token_ids": prompt},)
    if len(prompt) > MAX_PROMPTS:
        raise InputError("prompt", f"{len(prompt)} prompts; at most {MAX_PROMPTS} of one request")
    for each in prompt:
        if not isinstance(each, str | list):
            raise InputError(
                "prompt", f"{truncated_repr(each)}: must be a text or a list of token ids"
            )
    return tuple(
        {"prompt": each} if isinstance(each, str) else {"prompt_token_ids": each} for each in prompt
    )


def _asked(prompts: tuple[Mapping[str, Any], ...], given: dict[str, Any]) -> ParsedRequest:
    """`given`: what else stands in the body."""
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
            _refuse(name)
    try:
        RequestOptions(**options)
        params = SamplingParams(**sampling, structured=form)
    except ValueError as error:
        raise InputError(field_in(str(error)), str(error)) from None
    told = cast(OptionFields, options)
    return ParsedRequest(prompts, params, told, stream, *usage, form_field)


def _read_stream_options(given: Any, stream: bool) -> tuple[bool, bool]:
    """Return whether usage goes to the stream's end, and whether into each chunk."""
    if given is None:
        return False, False
    if not isinstance(given, dict) or not stream:
        raise InputError("stream_options", "is an object, and goes with stream=true")
    for name in given:
        if name not in STREAM_FIELDS:
            _refuse(f"stream_options.{name}")
    return read_flag(given, "include_usage"), read_flag(given, "continuous_usage_stats")


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a field asks for nothing. 0 and false are two things."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool)
        for each in NEUTRAL.get(name, ())
    )


def _read_param(name: str, value: Any, given: Mapping[str, Any]) -> Any:
    """A field of `SamplingParams` in its own form."""
    if isinstance(PARAMS[name], bool):
        return read_flag(given, name)
    if name == "logit_bias":
        return _read_bias(value)
    if name == "top_k" and value == -1:  # vLLM's word for all tokens
        return 0
    return value


def _read_bias(given: Any) -> dict[int, float]:
    """JSON's keys are texts."""
    if not isinstance(given, dict):
        raise InputError("logit_bias", "must be an object of token ids and numbers")
    for token in given:
        if not token.isdecimal() or len(token) > 9:
            raise InputError("logit_bias", f"{truncated_repr(token)}: must be token ids")
    return {int(token): bias for token, bias in given.items()}


def _refuse(name: str) -> NoReturn:
    if name in RENAMED:
        text = f"{name}: here it is {RENAMED[name]}"
        raise ApiError(400, text, param=name, code="unsupported_parameter")
    if name in NEUTRAL:
        text = f"{name}: this server does not have it yet; leave it out"
        raise ApiError(400, text, param=name, code="unsupported_parameter")
    text = f"{truncated_repr(name)}: unknown; leave it out"
    raise ApiError(400, text, param=name, code="unknown_parameter")
