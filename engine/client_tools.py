"""Tools and calls between OpenAI's form and the public protocol's, for the client."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..proto import octavo_pb2 as pb
from .client_error import invalid
from .tool_calls import ToolCall


def add_tools(request: pb.GenerateRequest, tools: Sequence[Any] | None, choice: Any) -> None:
    """Raises `ClientError` for what has no place in the protocol; the server checks the rest."""
    for index, tool in enumerate(tools or ()):
        field = f"tools[{index}]"
        if _mapping(tool, field).get("type") != "function":
            raise invalid(f"{field}.type: must be function")
        function = dict(_mapping(tool.get("function"), f"{field}.function"))
        if "parameters" in function:
            function["parameters"] = _json(function["parameters"], f"{field}.function.parameters")
        function.pop("strict", None)  # says something of OpenAI's own service
        try:
            request.tools.add(function=pb.Function(**function))
        except (TypeError, ValueError) as error:
            raise invalid(f"{field}.function: {error}") from None
    if isinstance(choice, str):
        request.tool_choice = choice
    elif choice is not None:
        named = _mapping(_mapping(choice, "tool_choice").get("function"), "tool_choice.function")
        request.tool_name = str(named.get("name", ""))


def message_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message's fields of `pb.Message` about calls. Raises `ClientError`."""
    found: dict[str, Any] = {}
    for index, call in enumerate(message.get("tool_calls") or ()):
        field = f"messages: tool_calls[{index}]"
        function = _mapping(_mapping(call, field).get("function"), f"{field}.function")
        arguments = function.get("arguments", "")
        if not isinstance(arguments, str):
            arguments = _json(arguments, f"{field}.function.arguments")
        made = pb.FunctionCall(name=function.get("name", ""), arguments=arguments)
        found.setdefault("tool_calls", []).append(pb.ToolCall(id=call.get("id"), function=made))
    if message.get("tool_call_id"):
        found["tool_call_id"] = message["tool_call_id"]
    return found


def read_calls(calls: Sequence[pb.ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(c.function.name, c.function.arguments, c.id) for c in calls)


def _json(value: Any, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise invalid(f"{field}: must be made of what JSON has") from None


def _mapping(value: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise invalid(f"{field}: must be a dict, not {type(value).__name__}")
    return value
