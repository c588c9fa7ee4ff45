"""Tools, calls and results as turns of a conversation.

Qwen2-VL's chat template has no tools, so they are written in Qwen2.5's format. A template with
tools gets them unchanged. Client text is replaced by markers, as in `chat_template.py`, so that it
cannot inject special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateRuntimeError, pass_context
from jinja2.runtime import Context

from ...scheduler.params import truncated_repr
from ..errors import InputError
from .schema import SECTION_HEAD, SECTION_TAIL


def in_order_of_calls(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return message indices with the tool results sorted in the order of their calls.

    A result without tool_call_id keeps its position. Raises `InputError` for an unknown id.
    """
    order: list[int] = []
    results: list[tuple[int, int]] = []  # (index of its call, index of the message)
    calls: Sequence[Mapping[str, Any]] = ()
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            call = _call_index(message.get("tool_call_id"), calls, f"messages[{index}]")
            results.append((len(results) if call is None else call, index))
            continue
        order += [at for _, at in sorted(results)]
        order.append(index)
        results, calls = [], message.get("tool_calls") or ()
    return order + [at for _, at in sorted(results)]


def _call_index(given: Any, calls: Sequence[Mapping[str, Any]], field: str) -> int | None:
    """Return the index of the call with this id; None if the result or the calls have no ids."""
    ids = [call.get("id") for call in calls]
    if not given or (ids and not any(ids)):
        return None
    if given not in ids:
        text = f"{truncated_repr(given)}: not in tool_calls of the preceding assistant message"
        raise InputError(f"{field}.tool_call_id", text)
    return ids.index(given)


SYSTEM = "You are a helpful assistant."  # default of Qwen2-VL's template
MAX_INDENT = 16  # spaces per level in `tojson`
TEXTS = "octavo_texts"  # template variable with the texts of the markers
MARK = re.compile("\x00(\\d+)\x00")


@dataclass(frozen=True)
class Written:
    """JSON from a client: its value, and the marker of its text."""

    value: Mapping[str, Any]
    mark: str


def add_mark(text: str, texts: list[str]) -> str:
    """Append a text and return its marker."""
    texts.append(text)
    return f"\x00{len(texts) - 1}\x00"


def in_qwens_form(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Written]
) -> list[dict[str, Any]]:
    """Convert messages to plain system, user and assistant turns in Qwen2.5's format.

    Consecutive tool results become one user turn; the tools are appended to the system message.
    """
    turns: list[dict[str, Any]] = []
    was_tool = False
    for message in messages:
        is_tool = message["role"] == "tool"
        if is_tool:
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            if was_tool:
                turns[-1]["content"] += f"\n{content}"
            else:
                turns.append({"role": "user", "content": content})
        else:
            turns.append(_plain_turn(message))
        was_tool = is_tool
    return [*_with_section(turns, tools)] if tools else turns


def _plain_turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a message; an answer's calls are written in the model's own format."""
    lines = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"].mark
        lines.append(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>')
    content = "\n".join(lines) if "tool_calls" in message else message["content"]
    return {"role": message["role"], "content": content}


def _with_section(turns: list[dict[str, Any]], tools: Sequence[Written]) -> list[dict[str, Any]]:
    section = SECTION_HEAD + "".join(f"\n{tool.mark}" for tool in tools) + SECTION_TAIL
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": SYSTEM}, *turns]
    content = turns[0]["content"]
    if isinstance(content, str):
        content += section
    else:
        content = [*content, {"type": "text", "text": section}]
    return [{"role": "system", "content": content}, *turns[1:]]


def as_they_are(value: Any, mark: Callable[[str], str]) -> Any:
    """Convert messages or tools for a template with tools. `mark` replaces unsafe texts."""
    if isinstance(value, Written):
        return _marked(value.value, mark)
    if isinstance(value, Mapping):
        return {name: as_they_are(each, mark) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_they_are(each, mark) for each in value]
    return value


def _marked(value: Any, mark: Callable[[str], str]) -> Any:
    """Apply `mark` to all strings of a JSON value, whose depth is at most `schema.MAX_DEPTH`."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        return {_marked(name, mark): _marked(each, mark) for name, each in value.items()}
    return [_marked(each, mark) for each in value] if isinstance(value, list | tuple) else value


@pass_context
def to_json(context: Context, value: Any, indent: int | None = None) -> str:
    """Implement the filter `tojson` as in transformers, without HTML escapes. Return a marker."""
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise TemplateRuntimeError(f"tojson(indent={indent}): must be from 0 to {MAX_INDENT}")
    texts: list[str] = context[TEXTS]
    plain = _marked(value, lambda text: MARK.sub(lambda found: texts[int(found[1])], text))
    try:
        return add_mark(json.dumps(plain, ensure_ascii=False, indent=indent), texts)
    except (TypeError, ValueError):
        raise TemplateRuntimeError("tojson: the value is not JSON-serializable") from None
