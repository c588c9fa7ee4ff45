"""Convert tools and tool calls between OpenAI's format and protobuf, for the client."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...proto import octavo_pb2 as pb
from ...scheduler.params import truncated_repr
from ..tool_calling.parser import ToolCall
from .errors import invalid


def add_tools(
    request: pb.GenerateRequest,
    tools: Sequence[Any] | None,
    choice: Any,
    parallel: bool | None,
) -> None:
    """Add tools to a request. Raises `ClientError` for unrepresentable values only.

    The server checks the rest.
    """
    if tools is not None and not isinstance(tools, list | tuple):
        raise invalid(f"must be a list, not {type(tools).__name__}", "tools")
    for index, tool in enumerate(tools or ()):
        field = f"tools[{index}]"
        if _mapping(tool, field).get("type") != "function":
            raise invalid('must be "function"', f"{field}.type")
        function = dict(_mapping(tool.get("function"), f"{field}.function"))
        if function.get("parameters") is not None:
            function["parameters"] = _json(function["parameters"], f"{field}.function.parameters")
        for name in ("strict", "cache_control"):  # used only by other services
            function.pop(name, None)
        try:
            request.tools.add(function=pb.Function(**function))
        except (TypeError, ValueError) as error:
            raise invalid(str(error), f"{field}.function") from None
    try:
        if isinstance(choice, str):
            request.tool_choice = choice
        elif choice is not None:
            named = _mapping(choice, "tool_choice").get("function")
            request.tool_name = _mapping(named, "tool_choice.function").get("name", "")
    except (TypeError, ValueError) as error:
        raise invalid(str(error), "tool_choice") from None
    if parallel is not None:
        if not isinstance(parallel, bool):
            raise invalid(
                f"{truncated_repr(parallel)}: must be true or false", "parallel_tool_calls"
            )
        request.parallel_tool_calls = parallel


def message_calls(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a message's tool call fields of `pb.Message`. Raises `ClientError`."""
    calls: list[pb.ToolCall] = []
    given = message.get("tool_calls")
    if given is not None and not isinstance(given, list | tuple):
        raise invalid(f"must be a list, not {type(given).__name__}", f"{where}.tool_calls")
    for index, call in enumerate(given or ()):
        field = f"{where}.tool_calls[{index}]"
        function = _mapping(_mapping(call, field).get("function"), f"{field}.function")
        arguments = function.get("arguments", "")
        if not isinstance(arguments, str):
            arguments = _json(arguments, f"{field}.function.arguments")
        try:
            made = pb.FunctionCall(name=function.get("name", ""), arguments=arguments)
            calls.append(pb.ToolCall(id=call.get("id"), function=made))
        except (TypeError, ValueError) as error:
            raise invalid(str(error), field) from None
    called = message.get("tool_call_id")
    return {"tool_calls": calls} | ({"tool_call_id": called} if called else {})


def read_calls(calls: Sequence[pb.ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(c.function.name, c.function.arguments, c.id) for c in calls)


def _json(value: Any, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise invalid("must be JSON-serializable", field) from None


def _mapping(value: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise invalid(f"must be a dict, not {type(value).__name__}", field)
    return value
