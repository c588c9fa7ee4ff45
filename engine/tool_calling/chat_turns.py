"""Tools, calls and results as turns of a conversation: in Qwen2.5's form, which is what Qwen2-VL's
template is given, since it knows of none; or as they are, for a template with a form of its own.

What a client gave is a mark in all of it, as in `chat.py`: no text of it can forge a token.
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
    """Places of checked messages, the results that follow an answer in the order of its calls.

    Raises `InputError` for one that names none of these. One that names nothing stays in its place.
    """
    order: list[int] = []
    results: list[tuple[int, int]] = []  # the place of its call, and its own
    calls: Sequence[Mapping[str, Any]] = ()
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            place = _place_of(message.get("tool_call_id"), calls, f"messages[{index}]")
            results.append((len(results) if place is None else place, index))
            continue
        order += [at for _, at in sorted(results)]
        order.append(index)
        results, calls = [], message.get("tool_calls") or ()
    return order + [at for _, at in sorted(results)]


def _place_of(given: Any, calls: Sequence[Mapping[str, Any]], field: str) -> int | None:
    """None where there is nothing to go by."""
    ids = [call.get("id") for call in calls]
    if not given or (ids and not any(ids)):
        return None
    if given not in ids:
        text = f"{truncated_repr(given)}: is no id in tool_calls of the assistant's message before"
        raise InputError(f"{field}.tool_call_id", text)
    return ids.index(given)


SYSTEM = "You are a helpful assistant."  # Qwen2-VL's, where a conversation begins with no other
MAX_INDENT = 16  # spaces of a level in `tojson`
TEXTS = "octavo_texts"  # a template's variable: what the marks stand for
MARK = re.compile("\x00(\\d+)\x00")


@dataclass(frozen=True)
class Written:
    """A client's JSON: as it is, and the mark of its text."""

    value: Mapping[str, Any]
    mark: str


def add_mark(text: str, texts: list[str]) -> str:
    texts.append(text)
    return f"\x00{len(texts) - 1}\x00"


def in_qwens_form(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Written]
) -> list[dict[str, Any]]:
    """Messages of the roles that every template has. Results that follow one another are one turn
    of the user's; the tools stand behind the system message."""
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
    """An answer with calls is as the model wrote it."""
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
    """Messages or tools for a template that knows them. `mark` hides a text where it must be."""
    if isinstance(value, Written):
        return _marked(value.value, mark)
    if isinstance(value, Mapping):
        return {name: as_they_are(each, mark) for name, each in value.items()}
    return [as_they_are(each, mark) for each in value] if isinstance(value, list) else value


def _marked(value: Any, mark: Callable[[str], str]) -> Any:
    """A client's JSON: no deeper than `tools.MAX_DEPTH`."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        return {_marked(name, mark): _marked(each, mark) for name, each in value.items()}
    return [_marked(each, mark) for each in value] if isinstance(value, list | tuple) else value


@pass_context
def to_json(context: Context, value: Any, indent: int | None = None) -> str:
    """Templates' `tojson` as transformers has it: nothing is escaped for HTML. Gives a mark."""
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise TemplateRuntimeError(f"tojson(indent={indent}): must be from 0 to {MAX_INDENT}")
    texts: list[str] = context[TEXTS]
    plain = _marked(value, lambda text: MARK.sub(lambda found: texts[int(found[1])], text))
    try:
        return add_mark(json.dumps(plain, ensure_ascii=False, indent=indent), texts)
    except (TypeError, ValueError):
        raise TemplateRuntimeError("tojson of what JSON does not have") from None
