"""Grammars that enforce a request's `tool_choice`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...scheduler.params import SamplingParams
from ...scheduler.structured import MAX_FORM_BYTES, StructuredOutput
from ..errors import InputError
from .schema import read_choice, read_tools

# JSON format for llguidance, as Qwen writes it.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


# A schema with only these keywords lists all of a tool's arguments.
PLAIN = {"type", "properties", "required", "title", "description", "$schema", "$defs"}


def has_tool_grammar(prompt: Any) -> bool:
    """Return whether a prompt's `tool_choice` restricts its answers."""
    is_free = not isinstance(prompt, Mapping) or prompt.get("tool_choice") in (None, "auto", "none")
    return not is_free


def with_tool_choice(prompt: Any, params: SamplingParams | None) -> SamplingParams | None:
    """Add the grammar of a prompt's `tool_choice` to `params`. Raises `InputError`."""
    if not has_tool_grammar(prompt):
        return params
    grammar = tool_grammar(
        prompt.get("tools"), prompt["tool_choice"], prompt.get("parallel_tool_calls") is not False
    )
    return _with_grammar(params or SamplingParams(), grammar)


def _with_grammar(params: SamplingParams, grammar: str) -> SamplingParams:
    if params.structured is not None:
        raise InputError("tool_choice", "cannot be combined with structured output; remove one")
    try:
        return replace(params, structured=StructuredOutput(lark=grammar))
    except ValueError:  # the grammar is too large
        text = f"the schemas exceed {MAX_FORM_BYTES} bytes, the maximum with tool_choice"
        raise InputError("tools", text) from None


def tool_grammar(tools: Any, choice: Any, parallel: bool = True) -> str:
    """Return a Lark grammar for llguidance that allows only tool calls. Raises `InputError`.

    `choice`: "required", or an object that names one function, which is called exactly once.
    """
    read_tools(tools)
    kind = read_choice(choice, tools)
    if kind is None:
        tools = [t for t in tools if t["function"]["name"] == choice["function"]["name"]]
    names = [f"call_{index}" for index in range(len(tools))]
    more = r' ("\n" call)*' if kind is not None and parallel else ""
    rules = [f"start: call{more}", f"call: {' | '.join(names)}"]
    rules += [_call_rule(name, tool) for name, tool in zip(names, tools, strict=True)]
    return "\n".join(rules) + "\n"


def _call_rule(name: str, tool: Mapping[str, Any]) -> str:
    """Return the grammar rule `name` for calls of one tool.

    Arguments are an object even if the schema does not say so, in Qwen's JSON format. Free white
    space and undeclared arguments are excluded, since a small model may write them endlessly. As
    in OpenAI's API, a tool without parameters has no arguments.
    """
    function = tool["function"]
    parameters = function.get("parameters") or {"properties": {}}
    head = f'<tool_call>\n{{"name": "{function["name"]}", "arguments": '
    schema = {**parameters, "x-guidance": WRITTEN}
    if "$ref" not in schema:
        schema.setdefault("type", "object")
    if "properties" in parameters and parameters.keys() <= PLAIN and _names_all(parameters):
        schema["additionalProperties"] = False
    body, tail = json.dumps(schema).replace("&", r"\u0026"), json.dumps("}\n</tool_call>")
    return f"{name}: {json.dumps(head)} %json {body} {tail}"


def _names_all(parameters: Mapping[str, Any]) -> bool:
    """Return whether all required arguments are among the schema's properties."""
    named, required = parameters["properties"], parameters.get("required") or ()
    lists = isinstance(named, Mapping) and isinstance(required, list | tuple)
    return lists and all(isinstance(name, str) and name in named for name in required)
