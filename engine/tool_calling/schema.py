"""Validation of tools and calls, and their JSON in the format of Qwen2.5's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...scheduler.params import truncated_repr
from ..errors import InputError
from ..utils.json_reader import read_json
from ..utils.openai_fields import IGNORED_OF_TOOL, without

MAX_TOOLS = 128
MAX_TOOLS_SIZE = 1 << 20  # characters of JSON, of all tools or of one message's calls
MAX_DEPTH = 32  # of a JSON value
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")  # prompt fields, as in OpenAI's API
CHOICES = ("auto", "none", "required")
# Order of a function's fields in the prompt, the same for every API. Other fields follow, except
# `strict`, which only concerns OpenAI's service.
FUNCTION = ("name", "description", "parameters")
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")

SECTION_HEAD = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
SECTION_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def read_tools(tools: Any) -> list[str]:
    """Return each tool as JSON. Raises `InputError`."""
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        raise InputError("tools", f"must be a list, not {type(tools).__name__}")
    if len(tools) > MAX_TOOLS:
        raise InputError("tools", f"has {len(tools)} tools; the maximum is {MAX_TOOLS}")
    found = [_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InputError(
                f"tools[{index}].function.name", f"{truncated_repr(name)} is a duplicate"
            )
    if sum(map(len, found)) > MAX_TOOLS_SIZE:
        raise InputError("tools", f"exceeds {MAX_TOOLS_SIZE} characters of JSON")
    return found


def read_choice(choice: Any, tools: Any) -> str | None:
    """Validate OpenAI's `tool_choice`. Raises `InputError`.

    Returns "auto", "none" or "required", or None if the choice names one function. `tools` must be
    validated already.
    """
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in CHOICES:
            known = ", ".join(CHOICES)
            raise InputError(
                "tool_choice", f"{truncated_repr(choice)}; must be {known} or a function"
            )
        if choice == "required" and not tools:
            raise InputError("tool_choice", "required: the request has no tools; pass tools")
        return choice
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        raise InputError("tool_choice", "must be a string, or an object of type function")
    function = choice.get("function")
    if not isinstance(function, Mapping):
        raise InputError("tool_choice.function", "must be an object with a name")
    name = function.get("name")
    if name not in [tool["function"]["name"] for tool in tools or ()]:
        raise InputError(
            "tool_choice.function.name", f"{truncated_repr(name)} is not the name of a tool"
        )
    return None


def _read_tool(tool: Any, field: str) -> str:
    if not isinstance(tool, Mapping):
        raise InputError(field, f"must be an object, not {type(tool).__name__}")
    if tool.get("type") != "function":
        raise InputError(f"{field}.type", f"{truncated_repr(tool.get('type'))}; must be function")
    function, tool = tool.get("function"), without(tool, IGNORED_OF_TOOL)
    if not isinstance(function, Mapping):
        raise InputError(f"{field}.function", f"must be an object, not {type(function).__name__}")
    function = without(function, IGNORED_OF_TOOL)
    # Clients send null for unset fields.
    function = {name: value for name, value in function.items() if value is not None}
    check_name(function.get("name"), f"{field}.function.name")
    if not isinstance(function.get("description", ""), str):
        raise InputError(f"{field}.function.description", "must be a string")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise InputError(f"{field}.function.parameters", "must be a JSON schema, an object")
    schema = function.get("parameters", {})
    if schema.get("type", "object") != "object":
        where, kind = f"{field}.function.parameters.type", truncated_repr(schema["type"])
        raise InputError(where, f"{kind}; must be object, since arguments are named")
    fields = {name: function[name] for name in FUNCTION if name in function}
    fields |= {name: each for name, each in function.items() if name not in (*FUNCTION, "strict")}
    return to_json({"type": "function", **tool, "function": fields}, field)


def check_name(name: Any, field: str) -> None:
    """Raise `InputError` unless `name` is a valid function name."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(
            field, f"{truncated_repr(name)}; must be 1 to 64 letters, digits, _, . or -"
        )


def read_calls(calls: Any, field: str) -> list[tuple[str, str]]:
    """Return (name, arguments as JSON) of each call of an assistant message.

    In the message, arguments are an object or its JSON. Raises `InputError`.
    """
    if not isinstance(calls, list | tuple):
        raise InputError(field, f"must be a list, not {type(calls).__name__}")
    if len(calls) > MAX_TOOLS:
        raise InputError(field, f"has {len(calls)} calls; the maximum is {MAX_TOOLS}")
    return [_read_call(call, f"{field}[{index}]") for index, call in enumerate(calls)]


def _read_call(call: Any, field: str) -> tuple[str, str]:
    if not isinstance(call, Mapping):
        raise InputError(field, f"must be an object, not {type(call).__name__}")
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise InputError(f"{field}.function", f"must be an object, not {type(function).__name__}")
    check_name(function.get("name"), f"{field}.function.name")
    where, arguments = f"{field}.function.arguments", function.get("arguments", "{}")
    if isinstance(arguments, str):
        if len(arguments) > MAX_TOOLS_SIZE:
            raise InputError(where, f"exceeds {MAX_TOOLS_SIZE} characters")
        try:
            arguments = read_json(arguments.encode() or b"{}")
        except (ValueError, RecursionError):
            raise InputError(where, "is not valid JSON") from None
    if not isinstance(arguments, Mapping):
        raise InputError(where, "must be an object, or its JSON")
    return function["name"], to_json(arguments, where)


def to_json(value: Any, field: str) -> str:
    """Return JSON in the format of transformers' templates. Raises `InputError`."""
    _check_depth(value, field)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError):  # an unpaired surrogate is a ValueError
        raise InputError(field, "must be JSON-serializable") from None
    if len(text) > MAX_TOOLS_SIZE:
        raise InputError(field, f"exceeds {MAX_TOOLS_SIZE} characters of JSON")
    return text


def _check_depth(value: Any, field: str) -> None:
    """Reject values that are too deep or too large before they are serialized."""
    level, depth, size = [value], 0, 0
    while level:
        size += sum(len(each) if isinstance(each, str) else 1 for each in level)
        if depth > MAX_DEPTH:
            raise InputError(field, f"is nested deeper than {MAX_DEPTH} levels")
        if size > MAX_TOOLS_SIZE:
            raise InputError(field, f"exceeds {MAX_TOOLS_SIZE} characters of JSON")
        inner: list[Any] = []
        for each in level:
            if isinstance(each, Mapping):
                inner.extend(each.values())
                inner.extend(each)
            elif isinstance(each, Sequence) and not isinstance(each, str | bytes):
                inner.extend(each)
        level, depth = inner, depth + 1
