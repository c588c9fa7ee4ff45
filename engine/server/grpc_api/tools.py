"""Convert protobuf tools, tool calls and tool choices to OpenAI's format, which the engine uses."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from ....proto import octavo_pb2 as pb
from ....scheduler.params import truncated_repr
from ...errors import InputError
from ...tool_calling.parser import ToolCall
from ...tool_calling.schema import CHOICES, MAX_TOOLS, MAX_TOOLS_SIZE
from ...utils.json_reader import read_json

MAX_CALLS = 1 << 14  # over all messages


def read_tools(request: pb.GenerateRequest) -> dict[str, Any]:
    """Return the tool fields that are set. Raises `InputError`."""
    found: dict[str, Any] = {}
    if request.tools:
        if len(request.tools) > MAX_TOOLS:
            raise InputError("tools", f"has {len(request.tools)} tools; the maximum is {MAX_TOOLS}")
        if sum(len(tool.function.parameters) for tool in request.tools) > MAX_TOOLS_SIZE:
            raise InputError("tools", f"has over {MAX_TOOLS_SIZE} characters of JSON, the maximum")
        found["tools"] = [_read_tool(t, f"tools[{i}]") for i, t in enumerate(request.tools)]
    if request.tool_choice and request.tool_name:
        raise InputError("tool_name", "cannot be combined with tool_choice; set only one")
    if request.tool_choice:
        if request.tool_choice not in CHOICES:
            known = ", ".join(CHOICES)
            raise InputError(
                "tool_choice", f"{truncated_repr(request.tool_choice)}: must be one of {known}"
            )
        found["tool_choice"] = request.tool_choice
    if request.tool_name:
        if all(tool.function.name != request.tool_name for tool in request.tools):
            raise InputError(
                "tool_name",
                f"{truncated_repr(request.tool_name)}: must be the name of one of the tools",
            )
        named = {"name": request.tool_name}
        found["tool_choice"] = {"type": "function", "function": named}
    if request.HasField("parallel_tool_calls"):
        found["parallel_tool_calls"] = request.parallel_tool_calls
    return found


def _read_tool(tool: pb.Tool, field: str) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description:
        function["description"] = tool.function.description
    if tool.function.parameters:
        field = f"{field}.function.parameters"
        try:
            function["parameters"] = read_json(tool.function.parameters.encode())
        except (ValueError, RecursionError):
            raise InputError(field, "is not valid JSON") from None
    return {"type": "function", "function": function}


def check_calls(messages: Iterable[pb.Message]) -> None:
    """Raise `InputError` if tool calls exceed the limits on count or size."""
    calls = (call for message in messages for call in message.tool_calls)
    if sum(len(call.function.arguments) for call in islice(calls, MAX_CALLS)) > MAX_TOOLS_SIZE:
        raise InputError(
            "messages", f"have over {MAX_TOOLS_SIZE} characters in tool calls, the maximum"
        )
    if next(calls, None) is not None:
        raise InputError("messages", f"have over {MAX_CALLS} tool calls, the maximum")


def read_message_calls(message: pb.Message) -> dict[str, Any]:
    """Return a message's tool call fields that are set."""
    found: dict[str, Any] = {}
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls[: MAX_TOOLS + 1]
        ]
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    return found


def write_calls(calls: Iterable[ToolCall]) -> list[pb.ToolCall]:
    return [
        pb.ToolCall(id=call.id, function=pb.FunctionCall(name=call.name, arguments=call.arguments))
        for call in calls
    ]
