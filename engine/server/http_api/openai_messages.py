"""Convert OpenAI's messages to the engine's: `image_url` and `video_url` become images and videos.

Checks that the engine makes anyway are not repeated here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ....scheduler.params import truncated_repr
from ...errors import InputError
from ...input.chat_template import check_parts
from ...input.openai_parts import KIND_OF, read_media, with_type
from ...input.prompt import PLACEHOLDER
from ...utils.openai_fields import IGNORED_OF_PART, without, without_ignored

_MEDIA = re.compile(
    r"messages\[(\d+)\]\.content\[(\d+)\]\.(?:image|video)"
)  # the engine's field name


def read_messages(messages: Any) -> list[Any]:
    """Return a conversation for the engine. Raises `InputError`."""
    if not isinstance(messages, list):
        raise InputError("messages", "must be a list")
    contents = (each.get("content") for each in messages if isinstance(each, dict))
    check_parts(len(messages), (len(each) for each in contents if isinstance(each, list)))
    return [_read_message(each, f"messages[{m}]") for m, each in enumerate(messages)]


def _read_message(message: Any, field: str) -> Any:
    """Return the message without fields that have no effect."""
    if not isinstance(message, dict):
        raise InputError(field, f"must be an object, not {type(message).__name__}")
    if not isinstance(message.get("name"), str | None):
        raise InputError(f"{field}.name", "must be a string")
    found = {name: value for name, value in message.items() if value not in (None, [])}
    found = dict(without_ignored(found))
    if "function_call" in found:
        raise InputError(f"{field}.function_call", "is not supported; use tool_calls")
    content = message.get("content")
    if isinstance(content, list):
        content = [_read_part(part, f"{field}.content[{p}]") for p, part in enumerate(content)]
    return {**found, "content": content}


def _read_part(part: Any, field: str) -> Any:
    if not isinstance(part, dict):
        raise InputError(field, f"must be an object, not {type(part).__name__}")
    part = with_type(without(part, IGNORED_OF_PART), field)
    name = part.get("type")
    if name == "text":
        return part
    if not isinstance(name, str) or name not in KIND_OF:
        text = f"{truncated_repr(name)}: must be text, image_url or video_url"
        raise InputError(f"{field}.type", text)
    return read_media(part, name, f"{field}.{name}")


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
    field = _as_written(error.field, body)
    if field == error.field:
        return error
    return type(error)(field, field + str(error).removeprefix(error.field))


def _as_written(field: str, body: Mapping[str, Any]) -> str:
    if field == "prompt_token_ids":
        return "tokens" if "tokens" in body else "prompt"
    found = _MEDIA.match(field)
    if found is None:
        return field
    part = body["messages"][int(found[1])]["content"][int(found[2])]
    name = with_type(part, field)["type"]
    url = ".url" if isinstance(part[name], dict) else ""
    return f"{found[0].rpartition('.')[0]}.{name}{url}{field[found.end() :]}"
