"""Build `pb.GenerateRequest` from messages, raw prompts and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...proto import octavo_pb2 as pb
from ...scheduler.params import RequestOptions, SamplingParams, truncated_repr
from ...scheduler.structured import StructuredOutput
from ..errors import InputError
from ..input.openai_parts import URLS, read_media, with_type
from ..utils.openai_fields import IGNORED_OF_PART, without, without_ignored
from .errors import ClientError, invalid
from .media import KINDS, check_size, media_item
from .tools import message_calls

OPTIONS_OF_A_REQUEST = ("priority", "timeout_s", "cache_salt")


def with_params(params: SamplingParams | None, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Merge `params` and `settings`. Raises `ClientError` if a name is in both."""
    if params is None:
        return settings
    if not isinstance(params, SamplingParams):
        text = f"must be octavo.SamplingParams, not {type(params).__name__}"
        raise invalid(text, "params")
    for name in settings:
        if name in vars(params):
            raise invalid("is set in params too; set it only once", name)
    return {**vars(params), **settings}


def _set_all(request: pb.GenerateRequest, settings: Mapping[str, Any]) -> None:
    """Set sampling parameters and options of a request. Raises `ClientError`."""
    known = [*pb.SamplingParams.DESCRIPTOR.fields_by_name, *OPTIONS_OF_A_REQUEST]
    for name, value in settings.items():
        if name not in known:
            raise invalid(f"unknown setting; allowed are {', '.join(known)}", name)
        if value is None or (name == "seed" and value == -1):
            continue
        target = request if name in OPTIONS_OF_A_REQUEST else request.sampling
        try:
            if name == "logit_bias":
                target.logit_bias.update(value)  # type: ignore[union-attr]
            elif name == "structured":
                target.structured.CopyFrom(_structured(value))  # type: ignore[union-attr]
            elif name in ("stop", "stop_token_ids", "bad_words"):
                getattr(target, name).extend([value] if isinstance(value, str) else value)
            else:
                setattr(target, name, value)
        except (TypeError, ValueError):
            raise ClientError(
                "INVALID_ARGUMENT", _rejection_text(name, value), field=name
            ) from None


def _rejection_text(name: str, value: Any) -> str:
    """Return the engine's error text for a setting that protobuf rejects."""
    kind = RequestOptions if name in OPTIONS_OF_A_REQUEST else SamplingParams
    try:
        kind(**{name: value})
    except (TypeError, ValueError) as error:
        if str(error).startswith(name):
            return str(error)
    return f"{name}={truncated_repr(value)}: invalid type or value"


def read_prompt(
    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]], request_id: str
) -> pb.GenerateRequest:
    """Build a request from a text, token ids or messages, depending on the first element."""
    if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
        return chat_request(prompt, request_id)  # type: ignore[arg-type]
    return raw_request(prompt, request_id)  # type: ignore[arg-type]


def raw_request(prompt: str | Sequence[int], request_id: str) -> pb.GenerateRequest:
    request = _new_request(request_id)
    try:
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
    except (TypeError, ValueError):
        raise invalid("must be valid Unicode text or a list of token ids", "prompt") from None
    return request


def _new_request(request_id: str) -> pb.GenerateRequest:
    try:
        return pb.GenerateRequest(request_id=request_id)
    except (TypeError, ValueError):
        raise invalid(f"{truncated_repr(request_id)}: must be a string", "request_id") from None


def fill(
    request: pb.GenerateRequest,
    images: Sequence[Any] | None,
    videos: Sequence[Any] | None,
    settings: Mapping[str, Any],
) -> None:
    """Add media, sampling parameters and options to a request. Raises `ClientError`."""
    for kind, sources in (("image", images), ("video", videos)):
        for index, source in enumerate(sources or ()):
            part = source if isinstance(source, Mapping) else {kind: source}
            request.media.append(_item({**part, "type": kind}, f"{kind}s[{index}]"))
    _set_all(request, settings)
    check_size(request)


def chat_request(messages: Sequence[Mapping[str, Any]], request_id: str) -> pb.GenerateRequest:
    request = _new_request(request_id)
    request.conversation.CopyFrom(conversation_of(messages))
    return request


def conversation_of(messages: Sequence[Mapping[str, Any]]) -> pb.Conversation:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise invalid("must be a list of dicts with role and content", "messages")
    read = [_message(message, f"messages[{m}]") for m, message in enumerate(messages)]
    return pb.Conversation(messages=read)


def _structured(form: Any) -> pb.StructuredOutput:
    """Convert a structured output option. Raises TypeError or ValueError."""
    if not isinstance(form, StructuredOutput):
        raise TypeError("must be an octavo.StructuredOutput")
    if form.choice:
        return pb.StructuredOutput(choice=pb.Choice(texts=form.choice))
    return pb.StructuredOutput(**{form.field: getattr(form, form.field)})


def _message(message: Mapping[str, Any], field: str) -> pb.Message:
    if not isinstance(message, Mapping):
        raise invalid("must be a dict with role and content", field)
    message = without_ignored(message)
    for name in message:
        if name not in ("role", "content", "tool_calls", "tool_call_id"):
            raise invalid(
                f"{name!r} is unknown; a message has role, content, tool_calls and tool_call_id",
                field,
            )
    role = message.get("role", "")
    if not isinstance(role, str):
        raise invalid(f"{truncated_repr(role)}: must be a string", f"{field}.role")
    content = message.get("content")
    if content is None and message.get("role") == "assistant":
        content = ()
    if isinstance(content, bytes | Mapping) or not isinstance(content, Sequence):
        raise invalid("must be a string or a list of parts", f"{field}.content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    calls = message_calls(message, field)
    try:
        read = [_part(part, f"{field}.content[{p}]") for p, part in enumerate(parts)]
        return pb.Message(role=role, content=read, **calls)
    except (TypeError, ValueError) as error:  # ValueError: a lone surrogate in the role
        raise invalid(str(error), field) from None


def _part(part: Mapping[str, Any], field: str) -> pb.ContentPart:
    if not isinstance(part, Mapping):
        raise invalid(f"must be a dict, not {type(part).__name__}", field)
    try:
        part = with_type(without(part, IGNORED_OF_PART), field)
    except InputError as error:
        raise ClientError("INVALID_ARGUMENT", str(error), field=error.field) from None
    if part.get("type") == "text":
        for name in part:
            if name not in ("type", "text"):
                raise invalid(
                    f"{truncated_repr(name)} is unknown; a text part has type and text", field
                )
        try:
            return pb.ContentPart(text=part.get("text", ""))
        except (TypeError, ValueError):  # ValueError: a lone surrogate
            raise invalid("must be valid Unicode text", f"{field}.text") from None
    if not isinstance(part.get("type"), str):
        raise invalid(f"type={truncated_repr(part.get('type'))}: must be a string", field)
    if part["type"] in URLS:
        name = part["type"]
        try:
            part = read_media(part, name, f"{field}.{name}")
        except InputError as error:
            raise ClientError("INVALID_ARGUMENT", str(error), field=error.field) from None
    if part.get("type") in KINDS:
        return pb.ContentPart(media=_item(part, field))
    raise invalid(
        f"type={part.get('type')!r}: must be text, image, video, image_url or video_url",
        field,
    )


def _item(part: Mapping[str, Any], field: str) -> pb.MediaItem:
    try:
        return media_item(part)
    except ClientError as error:
        raise invalid(error.text, field) from None
